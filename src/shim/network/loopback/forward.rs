//! Port forwarding. For `kubectl port-forward` containerd connects to a port of the loopback interface in the pod's
//! network namespace on the host, where no process of the pod listens. Connections to any port are accepted here and
//! forwarded to the same port of the guest's loopback interface. If no process listens there, the connection is reset.
//!
//! Bytes do not pass through the shim: the vmm gets the descriptor of the connection. The guest of a virtual machine
//! may have no agent that connects to its loopback interface. Then the shim connects to the guest's address, over the
//! network, and relays.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::Linger};
use nutshell_protocol::Request;
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
};

use super::lookup::SocketLookup;
use crate::shim::machine::{Agent, Machine};

/// How many forwarded connections a pod may have at a time. Further ones wait in the sockets' backlogs.
const MAX_CONNECTIONS: usize = 128;

/// How long the guest may take to connect. The agent has a shorter timeout itself.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait after a connection could not be accepted.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Where a forwarded connection goes.
#[derive(Debug)]
pub(crate) enum ForwardTarget {
    /// To the guest's loopback interface, by its agent.
    Loopback(Arc<Machine>, Agent),
    /// To this address of the guest, over the network.
    Address(IpAddr),
}

/// Finds the target of a new connection. `None` if there is no guest.
pub(crate) type FindTarget = Arc<dyn Fn() -> Option<ForwardTarget> + Send + Sync>;

/// The sockets that accept connections to any loopback port.
#[derive(Debug)]
pub(in crate::shim::network) struct ForwardListeners {
    sockets: Vec<TcpListener>,
    lookup: SocketLookup,
}

impl ForwardListeners {
    /// Opens them in `namespace`, which must be the calling thread's network namespace.
    pub(in crate::shim::network) fn open(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let ipv4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // The namespace may have no IPv6.
        let ipv6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok();
        let lookup = SocketLookup::attach(namespace, [Some(ipv4.as_fd()), ipv6.as_ref().map(AsFd::as_fd)])?;
        let sockets: Vec<_> = [Some(ipv4), ipv6].into_iter().flatten().collect();
        for socket in &sockets {
            socket.set_nonblocking(true)?;
        }
        Ok(Self { sockets, lookup })
    }

    /// Accepts a connection of the socket at `index`: 0 for IPv4, 1 for IPv6.
    #[cfg(test)]
    pub(in crate::shim::network) fn accept(&self, index: usize) -> std::net::TcpStream {
        self.sockets[index].accept().unwrap().0
    }

    /// Forwards connections to the targets that `find_target` returns, until the result is dropped. Needs the Tokio
    /// runtime.
    pub(in crate::shim::network) fn serve(self, find_target: &FindTarget) -> io::Result<Forwarding> {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let tasks = self
            .sockets
            .into_iter()
            .map(|socket| {
                let socket = tokio::net::TcpListener::from_std(socket)?;
                Ok(tokio::spawn(accept_connections(
                    socket,
                    find_target.clone(),
                    permits.clone(),
                )))
            })
            .collect::<io::Result<_>>()?;
        Ok(Forwarding {
            tasks,
            _lookup: self.lookup,
        })
    }
}

/// Running port forwarding. After a drop, it accepts no more connections. The connections that the shim relays end;
/// others continue.
#[derive(Debug)]
pub(in crate::shim::network) struct Forwarding {
    tasks: Vec<JoinHandle<()>>,
    _lookup: SocketLookup,
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn accept_connections(listener: tokio::net::TcpListener, find_target: FindTarget, permits: Arc<Semaphore>) {
    let mut last_error = None;
    // When this task ends, the set is dropped, which ends the relays.
    let mut relays = JoinSet::new();
    loop {
        while relays.try_join_next().is_some() {}
        // An error means that the semaphore was closed, which never happens.
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((connection, _)) => {
                last_error = None;
                let target = find_target();
                let is_relayed = matches!(target, Some(ForwardTarget::Address(_)));
                let forwarded = async move {
                    forward(target, connection).await;
                    drop(permit);
                };
                if is_relayed {
                    relays.spawn(forwarded);
                } else {
                    tokio::spawn(forwarded);
                }
            }
            // The connection is gone already, or the shim has no free descriptor. The connection then stays in the
            // queue, and nothing reports that there is a descriptor again.
            Err(error) => {
                if last_error.replace(error.kind()) != Some(error.kind()) {
                    log::warn!("cannot accept a connection to a port of the pod: {error}");
                }
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

async fn forward(target: Option<ForwardTarget>, mut connection: TcpStream) {
    let Ok(dialled) = connection.local_addr() else { return };
    let forwarded = match target {
        Some(ForwardTarget::Loopback(machine, agent)) => connect_to_guest(&machine, &agent, &connection, dialled).await,
        Some(ForwardTarget::Address(address)) => relay(&mut connection, SocketAddr::new(address, dialled.port())).await,
        None => Err("there is no guest".to_owned()),
    };
    if let Err(error) = forwarded {
        log::debug!(
            "cannot forward a connection to port {} of the pod: {error}",
            dialled.port()
        );
        reset(&connection);
    }
}

/// Connects to `address`, and relays until both directions have ended.
async fn relay(connection: &mut TcpStream, address: SocketAddr) -> Result<(), String> {
    let guest = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let guest = guest.map_err(|_| format!("{address} did not accept the connection in time"))?;
    let mut guest = guest.map_err(|error| format!("connect to {address}: {error}"))?;
    let relayed = tokio::io::copy_bidirectional(connection, &mut guest).await;
    relayed.map(drop).map_err(|error| error.to_string())
}

/// Connects `connection` to `target` in the guest, and waits for its end.
async fn connect_to_guest(
    machine: &Machine,
    agent: &Agent,
    connection: &TcpStream,
    target: SocketAddr,
) -> Result<(), String> {
    let descriptor = connection.as_fd();
    let opened = machine.open_stream(Some(descriptor), Some(descriptor)).await;
    let mut stream = opened.map_err(|error| error.to_string())?;
    let request = Request::ForwardConnection {
        stream_port: stream.port(),
        targets: targets(target),
    };
    let failure = match tokio::time::timeout(CONNECT_TIMEOUT, agent.run(request)).await {
        Ok(Ok(())) => {
            stream.closed().await;
            return Ok(());
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the guest did not connect in time".to_owned(),
    };
    // Before the vmm closes its descriptor, so that the client sees a reset and not an orderly end.
    reset(connection);
    machine.close_stream(&stream).await;
    Err(failure)
}

/// The addresses to try in the guest. A client of `localhost` accepts either address family, but because the first one
/// that it tried was accepted here, it will not try the other.
fn targets(dialled: SocketAddr) -> Vec<SocketAddr> {
    let other: IpAddr = match dialled.ip() {
        IpAddr::V4(_) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv4Addr::LOCALHOST.into(),
    };
    vec![dialled, SocketAddr::new(other, dialled.port())]
}

/// Makes the kernel reset the connection when the last of its descriptors is closed.
fn reset(connection: &TcpStream) {
    let no_linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    if let Err(error) = setsockopt(&connection.as_fd(), Linger, &no_linger) {
        log::debug!("cannot reset forwarded connection {}: {error}", connection.as_raw_fd());
    }
}
