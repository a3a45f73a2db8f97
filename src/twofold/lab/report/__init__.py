"""From figures to results: run what they need, judge it, and write one page that holds everything."""

from twofold.lab.report.reproduction import Report, Reproduction, plan, reproduce, write_report

__all__ = ["Report", "Reproduction", "plan", "reproduce", "write_report"]
