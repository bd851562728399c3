//! The states of a process and the only ways between them: created → running → (paused) → stopped →
//! deleted. The init of a container and every exec have one [`Lifecycle`] each.
//!
//! Answers what containerd asks for at any moment, and keeps two promises: an exit is recorded once,
//! and never while a start is under way, so that the start is always announced first.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::shim::error::{Kind, TaskError};

/// The status of a process that has none: what containerd calls unknown (`UnknownExitStatus`).
pub(crate) const UNKNOWN_STATUS: u32 = 255;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0–255; 128 + n for a process killed by signal n.
    pub(crate) status: u32,
    /// Host clock.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An exit of this moment.
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It is being made; nobody knows of it yet.
    Creating,
    /// It exists and has not run its first instruction.
    Created,
    /// A start is under way.
    Starting,
    /// It runs.
    Running,
    /// It is frozen.
    Paused,
    /// It has ended.
    Stopped(Exit),
    /// It has ended and is being forgotten.
    Deleting(Exit),
    /// It is forgotten; only those who waited still see it.
    Deleted(Exit),
}

impl Phase {
    /// The exit, once there is one.
    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Creating | Self::Created | Self::Starting | Self::Running | Self::Paused => None,
            Self::Stopped(exit) | Self::Deleting(exit) | Self::Deleted(exit) => Some(exit),
        }
    }

    /// As it stands in error texts.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Creating | Self::Created => "created",
            Self::Starting | Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
            Self::Deleting(_) | Self::Deleted(_) => "deleted",
        }
    }
}

/// What was asked for is not possible where the process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {action} a {} process", phase.name())]
pub(crate) struct WrongPhase {
    action: &'static str,
    phase: Phase,
}

impl From<WrongPhase> for TaskError {
    fn from(wrong: WrongPhase) -> Self {
        Self::new(Kind::FailedPrecondition, wrong.to_string())
    }
}

/// Who may delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deletion {
    /// The caller, who calls [`Lifecycle::deleted`] afterwards.
    Begun(Exit),
    /// Somebody else is at it: the caller waits for [`Lifecycle::deletion`].
    UnderWay,
}

/// The state of one process.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: watch::Sender<Phase>,
}

impl Lifecycle {
    /// Of the first process of a container that is being made.
    pub(crate) fn creating() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Creating),
        }
    }

    /// Of an exec, which exists as soon as it was added.
    pub(crate) fn added() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Created),
        }
    }

    /// Creating → created.
    pub(crate) fn created(&self) {
        self.step(|phase| matches!(phase, Phase::Creating).then_some(Phase::Created));
    }

    /// Creating → deleted: it came to nothing.
    pub(crate) fn abandoned(&self) {
        self.step(|phase| matches!(phase, Phase::Creating).then(|| Phase::Deleted(Exit::now(UNKNOWN_STATUS))));
    }

    /// Where the process is now.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Created → starting. [`Self::started`] or [`Self::start_failed`] follows.
    pub(crate) fn begin_start(&self) -> Result<(), WrongPhase> {
        self.change("start", |phase| match phase {
            Phase::Created => Ok(Phase::Starting),
            other => Err(other),
        })
    }

    /// Starting → running.
    pub(crate) fn started(&self) {
        self.step(|phase| matches!(phase, Phase::Starting).then_some(Phase::Running));
    }

    /// Starting → stopped if there is an exit (an exec that could not run is over), else → created.
    pub(crate) fn start_failed(&self, exit: Option<Exit>) {
        self.step(|phase| matches!(phase, Phase::Starting).then_some(exit.map_or(Phase::Created, Phase::Stopped)));
    }

    /// Running → paused; without effect on a process that ended meanwhile.
    pub(crate) fn paused(&self) {
        self.step(|phase| matches!(phase, Phase::Running).then_some(Phase::Paused));
    }

    /// Paused → running; without effect on a process that ended meanwhile.
    pub(crate) fn resumed(&self) {
        self.step(|phase| matches!(phase, Phase::Paused).then_some(Phase::Running));
    }

    /// Created, running or paused → stopped. Waits while a creation or start is under way. Runs
    /// `announce` before anybody sees the exit, unless one was recorded before: that one stands.
    pub(crate) async fn exited(&self, exit: Exit, announce: impl FnOnce()) {
        let mut announce = Some(announce);
        loop {
            let done = self.step(|phase| match phase {
                Phase::Created | Phase::Running | Phase::Paused => {
                    if let Some(announce) = announce.take() {
                        announce();
                    }
                    Some(Phase::Stopped(exit))
                }
                _ => None,
            });
            if done || self.phase().exit().is_some() {
                return;
            }
            self.reaches(|phase| !matches!(phase, Phase::Creating | Phase::Starting))
                .await;
        }
    }

    /// Stopped → deleting, where the process has ended.
    pub(crate) fn begin_deletion(&self) -> Result<Deletion, WrongPhase> {
        let mut begun = None;
        let refused = self.change("delete", |phase| match phase {
            Phase::Stopped(exit) => {
                begun = Some(exit);
                Ok(Phase::Deleting(exit))
            }
            other => Err(other),
        });
        match (begun, refused) {
            (Some(exit), _) => Ok(Deletion::Begun(exit)),
            (None, Err(wrong))
                if matches!(
                    wrong.phase,
                    Phase::Creating | Phase::Created | Phase::Starting | Phase::Running | Phase::Paused
                ) =>
            {
                Err(wrong)
            }
            (None, _) => Ok(Deletion::UnderWay),
        }
    }

    /// Deleting → deleted.
    pub(crate) fn deleted(&self) {
        self.step(|phase| match phase {
            Phase::Deleting(exit) => Some(Phase::Deleted(exit)),
            _ => None,
        });
    }

    /// Waits for the process's end.
    pub(crate) async fn exit(&self) -> Exit {
        loop {
            if let Some(exit) = self.reaches(|phase| phase.exit().is_some()).await.exit() {
                return exit;
            }
        }
    }

    /// Waits for the end of the deletion.
    pub(crate) async fn deletion(&self) -> Exit {
        self.reaches(|phase| matches!(phase, Phase::Deleted(_))).await;
        self.exit().await
    }

    async fn reaches(&self, wanted: impl Fn(Phase) -> bool) -> Phase {
        let mut receiver = self.phase.subscribe();
        match receiver.wait_for(|phase| wanted(*phase)).await {
            Ok(phase) => *phase,
            // The sender is `self`, which is borrowed here.
            Err(_) => self.phase(),
        }
    }

    fn step(&self, next: impl FnOnce(Phase) -> Option<Phase>) -> bool {
        self.phase.send_if_modified(|phase| match next(*phase) {
            Some(next) => {
                *phase = next;
                true
            }
            None => false,
        })
    }

    fn change(&self, action: &'static str, next: impl FnOnce(Phase) -> Result<Phase, Phase>) -> Result<(), WrongPhase> {
        let mut refused = None;
        self.step(|phase| next(phase).map_err(|phase| refused = Some(phase)).ok());
        refused.map_or(Ok(()), |phase| Err(WrongPhase { action, phase }))
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::UNIX_EPOCH};

    use super::*;

    const EXIT: Exit = Exit {
        status: 137,
        at: UNIX_EPOCH,
    };
    const LATER: Exit = Exit {
        status: 1,
        at: UNIX_EPOCH,
    };

    fn all() -> [Phase; 8] {
        [
            Phase::Creating,
            Phase::Created,
            Phase::Starting,
            Phase::Running,
            Phase::Paused,
            Phase::Stopped(EXIT),
            Phase::Deleting(EXIT),
            Phase::Deleted(EXIT),
        ]
    }

    fn at(phase: Phase) -> Lifecycle {
        Lifecycle {
            phase: watch::Sender::new(phase),
        }
    }

    /// Where `step` leads from each phase, in the order of [`all`].
    fn table(step: impl Fn(&Lifecycle)) -> [Phase; 8] {
        all().map(|phase| {
            let lifecycle = at(phase);
            step(&lifecycle);
            lifecycle.phase()
        })
    }

    #[test]
    fn every_step_changes_only_the_phases_it_is_for() {
        use Phase::{Created, Creating, Deleted, Deleting, Paused, Running, Starting, Stopped};
        let (stopped, deleting, deleted) = (Stopped(EXIT), Deleting(EXIT), Deleted(EXIT));

        assert_eq!(
            table(|lifecycle| {
                let _ = lifecycle.begin_start();
            }),
            [
                Creating, Starting, Starting, Running, Paused, stopped, deleting, deleted
            ]
        );
        assert_eq!(
            table(Lifecycle::created),
            [Created, Created, Starting, Running, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            table(Lifecycle::started),
            [Creating, Created, Running, Running, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            table(|lifecycle| lifecycle.start_failed(None)),
            [Creating, Created, Created, Running, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            table(|lifecycle| lifecycle.start_failed(Some(LATER))),
            [
                Creating,
                Created,
                Stopped(LATER),
                Running,
                Paused,
                stopped,
                deleting,
                deleted
            ]
        );
        assert_eq!(
            table(Lifecycle::paused),
            [Creating, Created, Starting, Paused, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            table(Lifecycle::resumed),
            [
                Creating, Created, Starting, Running, Running, stopped, deleting, deleted
            ]
        );
        assert_eq!(
            table(|lifecycle| {
                let _ = lifecycle.begin_deletion();
            }),
            [
                Creating, Created, Starting, Running, Paused, deleting, deleting, deleted
            ]
        );
        assert_eq!(
            table(Lifecycle::deleted),
            [Creating, Created, Starting, Running, Paused, stopped, deleted, deleted]
        );
    }

    #[test]
    fn refusals_say_what_cannot_be_done_to_what() {
        assert_eq!(
            at(Phase::Running).begin_start().unwrap_err().to_string(),
            "cannot start a running process"
        );
        assert_eq!(
            at(Phase::Running).begin_deletion().unwrap_err().to_string(),
            "cannot delete a running process"
        );
        assert_eq!(
            at(Phase::Stopped(EXIT)).begin_start().unwrap_err().to_string(),
            "cannot start a stopped process"
        );
    }

    /// Records `exit` and says whether it was announced.
    async fn exited(lifecycle: &Lifecycle, exit: Exit) -> bool {
        let mut announced = false;
        lifecycle.exited(exit, || announced = true).await;
        announced
    }

    #[tokio::test]
    async fn exit_is_recorded_once_from_every_phase_that_has_none() {
        for phase in [Phase::Created, Phase::Running, Phase::Paused] {
            let lifecycle = at(phase);
            assert!(exited(&lifecycle, EXIT).await);
            assert!(!exited(&lifecycle, LATER).await);
            assert_eq!(lifecycle.phase(), Phase::Stopped(EXIT));
        }
        for phase in [Phase::Stopped(EXIT), Phase::Deleting(EXIT), Phase::Deleted(EXIT)] {
            let lifecycle = at(phase);
            assert!(!exited(&lifecycle, LATER).await);
            assert_eq!(lifecycle.phase(), phase);
        }
    }

    #[tokio::test]
    async fn exit_waits_for_the_creation_or_start_under_way() {
        for (phase, settle) in [
            (Phase::Creating, Lifecycle::created as fn(&Lifecycle)),
            (Phase::Starting, Lifecycle::started),
        ] {
            let lifecycle = Arc::new(at(phase));
            let recorded = tokio::spawn({
                let lifecycle = lifecycle.clone();
                async move { exited(&lifecycle, EXIT).await }
            });
            tokio::task::yield_now().await;
            assert_eq!(lifecycle.phase(), phase);

            settle(&lifecycle);

            assert!(recorded.await.unwrap());
            assert_eq!(lifecycle.phase(), Phase::Stopped(EXIT));
        }
    }

    #[tokio::test]
    async fn exit_of_what_came_to_nothing_is_not_announced() {
        let lifecycle = Lifecycle::creating();
        lifecycle.abandoned();
        assert!(!exited(&lifecycle, EXIT).await);
        assert_eq!(lifecycle.exit().await.status, UNKNOWN_STATUS);
    }

    #[tokio::test]
    async fn all_who_wait_get_the_exit_before_and_after_it_happened() {
        let lifecycle = Arc::new(Lifecycle::added());
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let lifecycle = lifecycle.clone();
                tokio::spawn(async move { lifecycle.exit().await })
            })
            .collect();
        exited(&lifecycle, EXIT).await;
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), EXIT);
        }
        assert_eq!(lifecycle.exit().await, EXIT);
    }

    #[test]
    fn only_one_of_two_deletes_is_begun() {
        let lifecycle = at(Phase::Stopped(EXIT));
        assert_eq!(lifecycle.begin_deletion(), Ok(Deletion::Begun(EXIT)));
        assert_eq!(lifecycle.begin_deletion(), Ok(Deletion::UnderWay));
    }
}
