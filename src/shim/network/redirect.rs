//! Redirections: what arrives at one link leaves by another (tc-mirred(8)).

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
        TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
    },
};
use nix::libc;

use super::netlink::{Netlink, NetlinkError};

/// What the filter is called among those at the same place: late, so that others come first.
const PRIORITY: u32 = 0x6e75;

/// All protocols (`ETH_P_ALL`), as it goes over the wire.
const PROTOCOL: u32 = 3_u16.to_be() as u32;

/// One that is in place.
#[derive(Debug)]
pub(super) struct Redirect {
    from: u32,
    /// Nobody else had put the place for filters there.
    owns_qdisc: bool,
}

impl Redirect {
    /// From the link numbered `from` to the one numbered `to`.
    pub(super) fn make(netlink: &mut Netlink, from: u32, to: u32) -> Result<Self, NetlinkError> {
        let created = netlink.change(
            "put a place for filters at a link",
            qdisc(from),
            NLM_F_CREATE | NLM_F_EXCL,
        );
        let owns_qdisc = match created {
            Ok(()) => true,
            Err(error) if error.errno() == Some(libc::EEXIST) => {
                // A shim that was killed may have left its filter, which would win.
                let _ = netlink.change(
                    "remove an old filter",
                    RouteNetlinkMessage::DelTrafficFilter(place(from)),
                    0,
                );
                false
            }
            Err(error) => return Err(error),
        };
        let redirect = Self { from, owns_qdisc };
        match netlink.change("redirect a link's packets", filter(from, to), NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => Ok(redirect),
            Err(error) => {
                // The first error counts.
                let _ = redirect.remove(netlink);
                Err(error)
            }
        }
    }

    /// Takes it back.
    pub(super) fn remove(self, netlink: &mut Netlink) -> Result<(), NetlinkError> {
        if self.owns_qdisc {
            let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = qdisc(self.from) else {
                return Ok(());
            };
            netlink.change(
                "remove the place for filters",
                RouteNetlinkMessage::DelQueueDiscipline(qdisc),
                0,
            )
        } else {
            netlink.change(
                "remove a filter",
                RouteNetlinkMessage::DelTrafficFilter(place(self.from)),
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

/// Where the filter is.
fn place(link: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = link.cast_signed();
    message.header.parent = TcHandle {
        major: u16::MAX,
        minor: TcHandle::MIN_INGRESS,
    };
    message.header.info = PRIORITY << 16 | PROTOCOL;
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
    let mut message = place(from);
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    RouteNetlinkMessage::NewTrafficFilter(message)
}
