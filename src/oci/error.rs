//! Why there is no plan.

use std::{io, path::PathBuf};

/// Why a bundle cannot be planned. The text names the field of `config.json` or the path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    /// The bundle's `config.json` cannot be read.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The bundle's `config.json` is larger than any spec.
    #[error("{}: larger than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read.
        limit: u64,
    },
    /// It is no OCI runtime spec.
    #[error("{}: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field that every container needs is not there.
    #[error("{0} is missing from the OCI spec")]
    Missing(&'static str),
    /// A field's value is not one that it can have.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field or annotation.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A field asks for what a machine cannot do.
    #[error("{field}: {reason}")]
    Unsupported {
        /// The field.
        field: String,
        /// What it asks for, and what to do instead.
        reason: String,
    },
    /// The source of a bind mount cannot be looked at.
    #[error("bind mount source {}: {source}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The translated spec cannot be written down.
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
