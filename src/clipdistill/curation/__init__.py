"""Which pairs make a batch: those a student has still to learn and its teacher knows, or neighbours of its teacher."""
