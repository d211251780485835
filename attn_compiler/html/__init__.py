"""The report as one page for a browser: no other file, no network.

sites, near misses, graphs, kernels   ->   page.render   ->   text of an HTML file
"""
