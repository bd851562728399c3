//! The host's configuration.

/// What the host's owner decided.
#[derive(Debug)]
pub(crate) struct Configuration {}
