//! Redirects: packets that arrive at one link leave by another (tc-mirred(8)).

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
        TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
    },
};
use nix::libc;

use super::netlink::{NetlinkError, NetlinkSocket};

/// The priority of the filter. Lower numbers run first, so other filters of the link run before this one.
const FILTER_PRIORITY: u32 = 0x6e75;

/// The protocol that the filter matches: all (`ETH_P_ALL`), in network byte order.
const FILTER_PROTOCOL: u32 = 3_u16.to_be() as u32;

/// An installed redirect: a filter at the ingress qdisc of a link.
#[derive(Debug)]
pub(super) struct Redirect {
    /// The interface index of the link.
    from: u32,
    /// The link had no ingress qdisc before.
    owns_qdisc: bool,
}

impl Redirect {
    /// Redirects packets from one link to another. Both are interface indexes, and one of them is that of the pod's
    /// link `name`.
    pub(super) fn install(netlink: &mut NetlinkSocket, name: &str, from: u32, to: u32) -> Result<Self, NetlinkError> {
        let action = format!("add an ingress qdisc for {name} or its tap device");
        let created = netlink.change(&action, qdisc(from), NLM_F_CREATE | NLM_F_EXCL);
        let owns_qdisc = match created {
            Ok(()) => true,
            Err(error) if error.errno() == Some(libc::EEXIST) => {
                // A shim that was killed may have left its filter. It has the same priority, and matchall allows only
                // one filter per priority, so the new one would be refused with EEXIST.
                let _ = netlink.change(
                    "remove an old filter",
                    RouteNetlinkMessage::DelTrafficFilter(filter_key(from)),
                    0,
                );
                false
            }
            Err(error) => return Err(error),
        };
        let redirect = Self { from, owns_qdisc };
        let action = format!("redirect packets between {name} and its tap device");
        match netlink.change(&action, filter(from, to), NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => Ok(redirect),
            Err(error) => {
                // The first error is the one to report.
                let _ = redirect.remove(netlink);
                Err(error)
            }
        }
    }

    /// Removes the filter, and the qdisc if the link had none before.
    pub(super) fn remove(self, netlink: &mut NetlinkSocket) -> Result<(), NetlinkError> {
        if self.owns_qdisc {
            let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = qdisc(self.from) else {
                return Ok(());
            };
            netlink.change(
                "remove an ingress qdisc",
                RouteNetlinkMessage::DelQueueDiscipline(qdisc),
                0,
            )
        } else {
            netlink.change(
                "remove a filter",
                RouteNetlinkMessage::DelTrafficFilter(filter_key(self.from)),
                0,
            )
        }
    }
}

fn qdisc(link: u32) -> RouteNetlinkMessage {
    let mut message = TcMessage::default();
    message.header.index = link.cast_signed();
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle {
        major: u16::MAX,
        minor: 0,
    };
    message.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

/// Identifies the filter of a link.
fn filter_key(link: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = link.cast_signed();
    message.header.parent = TcHandle {
        major: u16::MAX,
        minor: TcHandle::MIN_INGRESS,
    };
    message.header.info = FILTER_PRIORITY << 16 | FILTER_PROTOCOL;
    message
}

fn filter(from: u32, to: u32) -> RouteNetlinkMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut message = filter_key(from);
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    RouteNetlinkMessage::NewTrafficFilter(message)
}
