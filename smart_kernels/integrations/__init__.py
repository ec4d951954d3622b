"""SMART in the places where people train; each module needs the library that it is named after."""
