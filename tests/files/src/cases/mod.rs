//! The cases, by subject. Each works in a directory of its own, and is independent of the others. [`crate::main`] runs
//! them.

pub(crate) mod content;
pub(crate) mod extras;
pub(crate) mod names;
pub(crate) mod permissions;
