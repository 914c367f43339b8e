"""What is measured beyond MTEB: python -m evals.<name>"""
