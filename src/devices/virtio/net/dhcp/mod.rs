//! A DHCPv4 server for the guest at one link (RFC 2131), inside of the network device.
//!
//! It has one lease, which it gives to any client: the link identifies the guest, not its MAC address or its client
//! identifier. It keeps no state, so a flood of requests needs no memory, and each request costs a bounded copy.
//!
//! While a link has a lease, each UDP datagram to port 67 ends here, even if it is malformed, comes from a relay agent,
//! or is addressed to another server: another server that received a request might answer with another address. Frames
//! with a VLAN tag and fragments are not examined.
//!
//! Belongs here: pure functions from the bytes of a request ([`request`]) to the bytes of an answer ([`answer`],
//! [`parameters`]). Does not belong here: virtqueues. The worker of a queue pair calls it.

mod answer;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod parameters;
mod request;
#[cfg(test)]
pub(super) mod tests;

pub(super) use self::{
    answer::Answer,
    request::{MAX_HEADERS_SIZE, MAX_REQUEST_SIZE, RequestError, is_for_server},
};
use self::{
    answer::AnswerKind,
    parameters::Configuration,
    request::{Request, RequestKind},
};
use crate::control::Lease;

/// The DHCP server of a link.
#[derive(Debug)]
pub(super) struct DhcpServer {
    configuration: Configuration,
}

impl DhcpServer {
    pub(super) fn new(lease: &Lease) -> Self {
        Self {
            configuration: Configuration::new(lease),
        }
    }

    /// The answer to the request in the Ethernet frame `frame`. `None` for requests to which the
    /// protocol has no answer.
    pub(super) fn answer(&self, frame: &[u8]) -> Result<Option<Answer>, RequestError> {
        let Configuration { server, leased, .. } = self.configuration;
        let request = Request::parse(frame)?;
        let kind = match request.kind {
            RequestKind::Discover => AnswerKind::Offer,
            RequestKind::Inform => AnswerKind::Configuration,
            // The client selects another server (RFC 2131 §4.3.2).
            RequestKind::Request if request.server.is_some_and(|selected| selected != server) => return Ok(None),
            RequestKind::Request => {
                let wanted = request.requested_address.or(request.client_address);
                match wanted.ok_or(RequestError::NoAddress)? == leased {
                    true => AnswerKind::Acknowledgement,
                    false => AnswerKind::Refusal,
                }
            }
            RequestKind::Decline => return Err(RequestError::Declined(leased)),
            RequestKind::Release => return Ok(None),
        };
        Ok(Some(answer::build(&self.configuration, &request, kind)))
    }
}
