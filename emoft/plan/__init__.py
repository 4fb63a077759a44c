"""`train.py --plan`: what a training will use and take, measured on a few of its steps before it begins."""
