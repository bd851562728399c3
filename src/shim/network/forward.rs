//! Forwarding: containerd connects to a port of the pod's loopback interface, on the host, where
//! nothing of the pod listens (`kubectl port-forward`). Whatever the port, the connection is taken
//! here and carried to the same port of the guest's loopback interface; where nobody listens there,
//! it is reset at once.
//!
//! The shim carries no byte: the vmm gets the connection's descriptor.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{Arc, Weak},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::Linger};
use nutshell_protocol::Request;
use tokio::{net::TcpStream, sync::Semaphore, task::JoinHandle};

use super::lookup::Lookup;
use crate::shim::machine::Machine;

/// How many connections a pod may have this way at a time; more wait.
const MAX_CONNECTIONS: usize = 128;

/// How long the guest may take to connect. It gives up by itself before.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Where connections arrive.
#[derive(Debug)]
pub(super) struct Listeners {
    sockets: Vec<TcpListener>,
    lookup: Lookup,
}

impl Listeners {
    /// In the calling thread's namespace, which `namespace` is.
    pub(super) fn open(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let ipv4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // There may be no IPv6.
        let ipv6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok();
        let lookup = Lookup::attach(namespace, [Some(ipv4.as_fd()), ipv6.as_ref().map(AsFd::as_fd)])?;
        let sockets: Vec<_> = [Some(ipv4), ipv6].into_iter().flatten().collect();
        for socket in &sockets {
            socket.set_nonblocking(true)?;
        }
        Ok(Self { sockets, lookup })
    }

    /// The connection that waits at one of the sockets.
    #[cfg(test)]
    pub(super) fn accept(&self, index: usize) -> std::net::TcpStream {
        self.sockets[index].accept().unwrap().0
    }

    /// Forwards to `machine` until the answer is dropped.
    pub(super) fn serve(self, machine: &Arc<Machine>) -> io::Result<Forwarding> {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let tasks = self
            .sockets
            .into_iter()
            .map(|socket| {
                let socket = tokio::net::TcpListener::from_std(socket)?;
                Ok(tokio::spawn(accept(socket, Arc::downgrade(machine), room.clone())))
            })
            .collect::<io::Result<_>>()?;
        Ok(Forwarding {
            tasks,
            _lookup: self.lookup,
        })
    }
}

/// What goes on; ends when it is dropped, but for connections that are made.
#[derive(Debug)]
pub(super) struct Forwarding {
    tasks: Vec<JoinHandle<()>>,
    _lookup: Lookup,
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn accept(listener: tokio::net::TcpListener, machine: Weak<Machine>, room: Arc<Semaphore>) {
    loop {
        // It is never closed.
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((connection, _)) => {
                let Some(machine) = machine.upgrade() else { return };
                tokio::spawn(async move {
                    forward(&machine, connection).await;
                    drop(place);
                });
            }
            // The connection is gone already, or there is no descriptor for it: then its end comes first.
            Err(error) => log::warn!("forward a port: {error}"),
        }
    }
}

async fn forward(machine: &Machine, connection: TcpStream) {
    let Ok(target) = connection.local_addr() else { return };
    if let Err(error) = carry(machine, &connection, target).await {
        log::debug!("forward port {}: {error}", target.port());
        reset(&connection);
    }
}

/// Returns when the connection has ended.
async fn carry(machine: &Machine, connection: &TcpStream, target: SocketAddr) -> Result<(), String> {
    let descriptor = connection.as_fd();
    let opened = machine.open_stream(Some(descriptor), Some(descriptor)).await;
    let mut stream = opened.map_err(|error| error.to_string())?;
    let request = Request::ForwardConnection {
        stream_port: stream.port(),
        targets: targets(target),
    };
    let connected = machine.within(CONNECT_LIMIT, machine.agent().run(request)).await;
    let failure = match connected {
        Some(Ok(())) => {
            stream.closed().await;
            return Ok(());
        }
        Some(Err(error)) => error.to_string(),
        None => "the guest did not connect in time".to_owned(),
    };
    // Its reset must not be an end in order.
    reset(connection);
    machine.close_stream(&stream).await;
    Err(failure)
}

/// Whoever dialled `localhost` meant either family. It was answered for the first that it tried, and will
/// not try the other.
fn targets(dialled: SocketAddr) -> Vec<SocketAddr> {
    let other: IpAddr = match dialled.ip() {
        IpAddr::V4(_) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv4Addr::LOCALHOST.into(),
    };
    vec![dialled, SocketAddr::new(other, dialled.port())]
}

/// The last of its descriptors that is closed resets it.
fn reset(connection: &TcpStream) {
    let at_once = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    if let Err(error) = setsockopt(&connection.as_fd(), Linger, &at_once) {
        log::debug!("reset connection {}: {error}", connection.as_raw_fd());
    }
}
