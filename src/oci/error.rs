//! Errors of planning.

use std::{io, path::PathBuf};

/// Why a plan cannot be made. The text names the field of the spec, or the path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    /// The file is not an OCI runtime spec.
    #[error("{} is not a valid OCI spec: {source}", path.display())]
    Malformed { path: PathBuf, source: serde_json::Error },
    /// The spec lacks a field that every container needs.
    #[error("{0} is missing from the OCI spec")]
    Missing(&'static str),
    /// A field, or an annotation, has a value that the specification does not allow.
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// A field requests something that a machine cannot do.
    #[error("{field}: {reason}")]
    Unsupported { field: String, reason: String },
    #[error("cannot inspect the bind mount source {}: {source}", path.display())]
    Source { path: PathBuf, source: io::Error },
    #[error("cannot encode the OCI spec for the guest: {0}")]
    Encode(#[source] serde_json::Error),
}

impl PlanError {
    pub(super) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(super) fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }
}
