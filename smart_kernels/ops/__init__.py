"""The operators: one file per op with its public function, schema, fake and autograd. No device code."""
