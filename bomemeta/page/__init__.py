"""`bomemeta report`: one self-contained HTML page about a run, and the style that other pages share."""

from bomemeta.page.session import write_report

__all__ = ["write_report"]
