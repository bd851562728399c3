//! Confinement of the children.
