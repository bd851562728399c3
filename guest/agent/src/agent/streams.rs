//! The pumps of all processes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use crate::poller::{Poller, Token};
use crate::stdio::{Progress, Pump};

#[derive(Debug)]
struct RunningPump {
    pump: Pump,
    container: Rc<str>,
    /// No process's record knows it any more: it goes when it ends.
    detached: bool,
}

/// The pumps of all processes.
#[derive(Debug, Default)]
pub(super) struct Streams {
    pumps: BTreeMap<u32, RunningPump>,
    /// Those that stopped for others' sake and have more to move.
    ready: BTreeSet<u32>,
}

impl Streams {
    /// Begins to move what a pump of `container` is for.
    pub(super) fn add(&mut self, poller: &Poller, number: u32, pump: Pump, container: &Rc<str>) -> io::Result<()> {
        for end in pump.descriptors().into_iter().flatten() {
            poller.watch_changes(end, Token::Pump(number))?;
        }
        let entry = RunningPump {
            pump,
            container: Rc::clone(container),
            detached: false,
        };
        // The poller tells at once what is ready already.
        self.pumps.insert(number, entry);
        Ok(())
    }

    /// Moves what pump `number` can move.
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

    /// Whether any pump could go on right now.
    pub(super) fn has_more(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Gives each pump that could go on its turn.
    pub(super) fn transfer_ready(&mut self) {
        for number in std::mem::take(&mut self.ready) {
            self.transfer(number);
        }
    }

    /// How many bytes went into the source of pump `number` so far.
    pub(super) fn bytes_written(&mut self, number: Option<u32>) -> u64 {
        let entry = number.and_then(|number| self.pumps.get_mut(&number));
        entry.map_or(0, |entry| entry.pump.bytes_written())
    }

    /// The process of this pump has been reported: the pump goes on by itself until its end.
    pub(super) fn detach(&mut self, number: u32) {
        let Some(entry) = self.pumps.get_mut(&number) else {
            return;
        };
        entry.detached = true;
        if entry.pump.is_ended() {
            self.pumps.remove(&number);
        }
    }

    /// Ends every pump of a container.
    pub(super) fn remove_container(&mut self, container: &str) {
        self.pumps.retain(|_, entry| &*entry.container != container);
    }
}
