//! Which creations in a pod may run at the same time: those of any number of containers, or that of one virtual
//! machine, which replaces the machine of the pod.
//!
//! A creation takes several steps, and the container is in the table of tasks only after the first ones. So it is not
//! enough that each creation looks there for others.

use std::sync::Arc;

use parking_lot::Mutex;

/// What is created in a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Creation {
    Container,
    VirtualMachine,
}

/// The creations that are in progress in a pod.
#[derive(Debug, Clone, Default)]
pub(crate) struct Admissions(Arc<Mutex<InProgress>>);

#[derive(Debug, Default)]
struct InProgress {
    containers: usize,
    virtual_machine: bool,
}

/// The permission to create. Drop it when the creation has ended, or the container is in the table of tasks.
#[derive(Debug)]
pub(crate) struct Admission {
    admissions: Admissions,
    creation: Creation,
}

impl Admissions {
    /// Permits a creation.
    ///
    /// # Errors
    ///
    /// The creation in progress that excludes it.
    pub(crate) fn admit(&self, creation: Creation) -> Result<Admission, Creation> {
        let mut in_progress = self.0.lock();
        if in_progress.virtual_machine {
            return Err(Creation::VirtualMachine);
        }
        match creation {
            Creation::VirtualMachine if in_progress.containers > 0 => return Err(Creation::Container),
            Creation::VirtualMachine => in_progress.virtual_machine = true,
            Creation::Container => in_progress.containers += 1,
        }
        Ok(Admission {
            admissions: self.clone(),
            creation,
        })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut in_progress = self.admissions.0.lock();
        match self.creation {
            Creation::Container => in_progress.containers -= 1,
            Creation::VirtualMachine => in_progress.virtual_machine = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_machine_excludes_all_other_creations() {
        const CONTAINER: Creation = Creation::Container;
        const MACHINE: Creation = Creation::VirtualMachine;
        for (first, second, expected) in [
            (CONTAINER, CONTAINER, None),
            (CONTAINER, MACHINE, Some(CONTAINER)),
            (MACHINE, CONTAINER, Some(MACHINE)),
            (MACHINE, MACHINE, Some(MACHINE)),
        ] {
            let admissions = Admissions::default();
            let admitted = admissions.admit(first).unwrap();
            assert_eq!(admissions.admit(second).err(), expected, "{first:?}, {second:?}");
            drop(admitted);
            admissions.admit(second).unwrap();
        }
    }
}
