"""The lab model: a very small Llama trained here, with everything needed to train it again."""
