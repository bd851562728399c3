//! The failures of a pod's network.

use std::{io, time::Duration};

use nutshell_protocol::NETWORK_SLOTS;

use super::netlink::NetlinkError;
use crate::shim::machine::{AgentError, VmmError};

/// Why a pod's network cannot be set up, or a change of it cannot be applied. `link` is the name of an interface.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("cannot {step} the pod's network namespace: {source}")]
    Namespace { step: &'static str, source: io::Error },
    /// A task or thread of the shim has panicked.
    #[error("a bug interrupted the work in the pod's network namespace: see the panic in containerd's log")]
    Interrupted,
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("cannot make a tap device for {link}: {step}: {source}")]
    Tap {
        link: String,
        /// The failed step.
        step: &'static str,
        source: io::Error,
    },
    #[error(
        "the pod's network namespace has {0} links that are up, and a virtual machine can have {NETWORK_SLOTS}: remove \
         links, or set down those that the pod does not need"
    )]
    TooManyLinks(usize),
    #[error(
        "the network namespace belongs to another virtual machine, whose tap device is {tap}: two machines cannot have the \
         same addresses; put the containers into one pod, or give each a separate network namespace"
    )]
    Occupied { tap: String },
    /// The vmm cannot plug the link's device.
    #[error("cannot plug {link} into the virtual machine: {source}")]
    Plug { link: String, source: VmmError },
    #[error("cannot connect the guest to Docker's resolver: {0}")]
    Names(#[source] io::Error),
    #[error("cannot set up the guest's network: {0}")]
    Guest(#[from] AgentError),
    #[error("cannot set up the guest's network: the agent did not answer within {} s", .0.as_secs())]
    NoAnswer(Duration),
}

impl NetworkError {
    /// `step` ends before "the pod's network namespace".
    pub(crate) fn namespace<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Namespace {
            step,
            source: source.into(),
        }
    }
}
