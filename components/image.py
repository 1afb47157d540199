"""The one image that all steps run in on a cluster; built from deploy/Dockerfile. Local runs use this environment instead."""

import os

IMAGE = os.environ.get("EGA_IMAGE", "ega:0.1.0")
