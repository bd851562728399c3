//! The pumps of all processes, by the number of their event source ([`Token::Pump`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use crate::poller::{Poller, Token};
use crate::stdio::{Progress, Pump};

#[derive(Debug)]
struct RunningPump {
    pump: Pump,
    container: Rc<str>,
    /// The exit of the process has been reported. The pump is removed when it ends.
    detached: bool,
}

/// The pumps of all processes.
#[derive(Debug, Default)]
pub(super) struct Pumps {
    pumps: BTreeMap<u32, RunningPump>,
    /// Pumps that used up their turn and have more data to move.
    ready: BTreeSet<u32>,
}

impl Pumps {
    /// Adds a pump of `container`, and watches its descriptors.
    pub(super) fn add(&mut self, poller: &Poller, number: u32, pump: Pump, container: &Rc<str>) -> io::Result<()> {
        for end in pump.descriptors().into_iter().flatten() {
            poller.watch_changes(end, Token::Pump(number))?;
        }
        let entry = RunningPump {
            pump,
            container: Rc::clone(container),
            detached: false,
        };
        // No first transfer is needed: epoll reports descriptors that are ready already.
        self.pumps.insert(number, entry);
        Ok(())
    }

    /// Runs one turn of pump `number`, if the pump still exists.
    pub(super) fn transfer(&mut self, number: u32) {
        self.ready.remove(&number);
        let Some(entry) = self.pumps.get_mut(&number) else {
            return;
        };
        match entry.pump.transfer() {
            Progress::Waiting => {}
            Progress::More => {
                self.ready.insert(number);
            }
            Progress::Ended if entry.detached => {
                self.pumps.remove(&number);
            }
            Progress::Ended => {}
        }
    }

    /// Whether any pump has more data to move without waiting.
    pub(super) fn has_more(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Runs one turn of each pump that has more data to move without waiting.
    pub(super) fn transfer_ready(&mut self) {
        for number in std::mem::take(&mut self.ready) {
            self.transfer(number);
        }
    }

    /// Returns how many bytes the process has written so far to the stream that pump `number` copies, or 0 if there is
    /// no such pump.
    pub(super) fn bytes_written(&mut self, number: Option<u32>) -> u64 {
        let entry = number.and_then(|number| self.pumps.get_mut(&number));
        entry.map_or(0, |entry| entry.pump.bytes_written())
    }

    /// Detaches a pump from its process, whose exit has been reported. The pump is removed when it ends.
    pub(super) fn detach(&mut self, number: u32) {
        let Some(entry) = self.pumps.get_mut(&number) else {
            return;
        };
        entry.detached = true;
        if entry.pump.is_ended() {
            self.pumps.remove(&number);
        }
    }

    pub(super) fn remove_container(&mut self, container: &str) {
        self.pumps.retain(|_, entry| &*entry.container != container);
    }
}
