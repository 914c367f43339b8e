"""Tools beside the product: python -m tools.<name>"""
