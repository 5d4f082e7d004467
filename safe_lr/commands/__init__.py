"""The commands of `safe-lr`, one a module. Each adds its parser, and sets `run` there."""

from safe_lr.commands import demo, measure, report, sweep, watch

COMMANDS = (report.add, watch.add, measure.add, sweep.add, demo.add)

__all__ = ["COMMANDS"]
