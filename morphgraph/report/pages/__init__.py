"""A report as one self-contained HTML file: its facts, their pictures, and the page."""
