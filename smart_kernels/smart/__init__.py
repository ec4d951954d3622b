"""The algorithm: SMART's objective, its adversaries and its teacher. Knows ops, never a device."""
