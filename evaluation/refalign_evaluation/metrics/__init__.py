"""The metrics of OpenS2V-Eval whose models are plainly loadable, each a module that measures one video at a time."""
