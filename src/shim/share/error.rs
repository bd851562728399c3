//! The failures of the file server and of sharing.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::jail::FailedStep;

/// Why the file server cannot be started, or its tree cannot be changed. `step` is the failed step, as an infinitive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error("cannot start the file server: {step}: {source}")]
    Start { step: &'static str, source: io::Error },
    /// A directory or file of the host cannot be shared.
    #[error("cannot share {} with the machine as {path}: {step}: {source}", what.display())]
    Attach {
        /// Its path on the host.
        what: PathBuf,
        /// Its path in the tree.
        path: String,
        step: &'static str,
        source: io::Error,
    },
    /// A directory or file of the host cannot be shared inside of another share.
    #[error("cannot share {} with the machine as {path}, inside of {outer}: {step}: {source}", what.display())]
    AttachInside {
        /// Its path on the host.
        what: PathBuf,
        /// Its path in the tree.
        path: String,
        /// The path of the other share in the tree.
        outer: String,
        step: &'static str,
        source: io::Error,
    },
    /// A mount of the snapshotter cannot be made.
    #[error("cannot mount the root file system: {kind} from {from} at {at} with {options:?}: {source}")]
    Rootfs {
        /// The file system type.
        kind: String,
        from: String,
        at: String,
        options: Vec<String>,
        source: io::Error,
    },
    #[error("cannot stop sharing {path}: {source}")]
    Detach {
        /// The path of the share in the tree.
        path: String,
        source: io::Error,
    },
    #[error("cannot start a thread for mounts: {0}")]
    Thread(#[source] io::Error),
}

/// Makes a [`ShareError::Attach`] of a failed step.
pub(super) fn attach_error(what: &Path, path: &str) -> impl Fn(FailedStep) -> ShareError {
    let (what, path) = (what.to_owned(), path.to_owned());
    move |(step, source)| ShareError::Attach {
        what: what.clone(),
        path: path.clone(),
        step,
        source,
    }
}

/// Makes a [`ShareError::AttachInside`] of a failed step.
pub(super) fn attach_inside_error(what: &Path, path: &str, outer: &str) -> impl FnOnce(FailedStep) -> ShareError {
    let (what, path, outer) = (what.to_owned(), path.to_owned(), outer.to_owned());
    move |(step, source)| ShareError::AttachInside {
        what,
        path,
        outer,
        step,
        source,
    }
}
