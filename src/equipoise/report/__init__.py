"""Findings and measures to terminal, HTML, JSON, CSV and figures."""
