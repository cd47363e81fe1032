"""`bomemeta report`: one self-contained HTML page about a run, and the style that other pages share."""
