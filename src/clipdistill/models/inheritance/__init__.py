"""Weight inheritance (TinyCLIP): students cut out of a teacher by rule, or by masks that are trained."""
