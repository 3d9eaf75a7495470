"""The programs behind `dflash-scale COMMAND`."""
