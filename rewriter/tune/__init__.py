"""Choosing what stands at each site: measuring, searching, deciding."""
