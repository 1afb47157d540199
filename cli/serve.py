"""`ega serve`: the ranking service in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from serving.launch import StartError, running_service
from serving.settings import ServingConfig, SettingsError
from serving.store import ApprovalError


def serve(config: ServingConfig, host: str = "127.0.0.1", port: int = 3000, log: Path | None = None) -> int:
    """Serve until told to stop; returns the exit code: 0 stopped, 1 could not start or ended by itself, 3 no approved model.

    Prints the URL once the service is ready. `log`: file for the service's output; default the terminal.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with running_service(config, host, port, log) as service:
            arms = ", ".join(f"{arm.name} ({arm.policy})" for arm in service.config.arms)
            models = ", ".join(f"{tag} ({place})" for place, tag in service.models.items())
            print(f"Ready: {service.url}   model {models or 'none'}   arms {arms}   admin {config.admin_host}:{config.admin_port}")
            print(f"  curl -s {service.url}/v1/rank -H 'Content-Type: application/json' -d '{{\"user_id\": 1, \"city_id\": 0, \"latitude\": 0.0, \"longitude\": 0.0}}'")
            print(f"  metrics {service.url}/metrics   docs/serving.md explains every field; Ctrl-C stops", flush=True)
            code = service.process.wait()
            print(f"error: the service ended by itself with exit code {code}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 0
    except ApprovalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (StartError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
