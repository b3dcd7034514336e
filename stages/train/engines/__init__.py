"""The engines behind `stages.train.engine.Engine`, one module each; nobody but `make_engine` imports them."""
