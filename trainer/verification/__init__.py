"""The promise, checked on this machine: `./launch.sh --verify`."""
