"""Environment variables of every process that EGA starts, on this machine and on a cluster. Standard library only: `ega --help` reads it."""

ENVIRONMENT = (
    # Telemetry of the libraries is off unless somebody asks for it.
    ("DO_NOT_TRACK", "1"),
    ("BENTOML_DO_NOT_TRACK", "True"),
    ("GX_ANALYTICS_ENABLED", "false"),
    # Waiting threads yield the CPU, which matters on shared machines.
    ("OMP_WAIT_POLICY", "PASSIVE"),
    # Freed memory is kept: tensors of a whole city would otherwise be unmapped and faulted in again at every operation.
    ("MALLOC_MMAP_THRESHOLD_", str(1 << 30)),
    ("MALLOC_TRIM_THRESHOLD_", str(1 << 30)),
)
