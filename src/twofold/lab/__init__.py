"""The lab: train models, sweep over settings, reproduce the paper's figures and report them."""
