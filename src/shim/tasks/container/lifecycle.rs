//! The states of a process and the transitions between them: creating → created → starting → running → (paused) →
//! stopped → deleting → deleted. The first process of a container and every exec have one [`Lifecycle`] each.
//!
//! The state can be read at any moment without waiting. Two guarantees hold: an exit is recorded once, and it is
//! never recorded while a start is in progress, so that containerd sees the start first.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::shim::error::{ErrorCode, TaskError};

/// Status of a process without an exit status (`UnknownExitStatus` of containerd).
pub(crate) const UNKNOWN_STATUS: u32 = 255;

/// Status of a process that was killed by SIGKILL: 128 + 9.
pub(crate) const SIGKILL_STATUS: u32 = 128 + libc::SIGKILL.unsigned_abs();

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255; 128 + n for a process killed by signal n.
    pub(crate) status: u32,
    /// By the host's clock.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An exit at the current time.
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// The state of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its creation is in progress. Calls do not find it yet.
    Creating,
    /// It exists and has not run its first instruction.
    Created,
    /// Its start is in progress.
    Starting,
    Running,
    /// It is frozen.
    Paused,
    Stopped(Exit),
    /// Its deletion is in progress.
    Deleting(Exit),
    /// Only calls that were waiting for it still see it.
    Deleted(Exit),
}

impl Phase {
    /// The exit, if the process has ended.
    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Creating | Self::Created | Self::Starting | Self::Running | Self::Paused => None,
            Self::Stopped(exit) | Self::Deleting(exit) | Self::Deleted(exit) => Some(exit),
        }
    }

    /// The name of the phase in error texts.
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

/// The phase of the process does not allow the action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {action} a {} process", phase.name())]
pub(crate) struct WrongPhase {
    action: &'static str,
    phase: Phase,
}

impl From<WrongPhase> for TaskError {
    fn from(wrong: WrongPhase) -> Self {
        Self::new(ErrorCode::FailedPrecondition, wrong.to_string())
    }
}

/// Which caller deletes the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deletion {
    /// This caller. It calls [`Lifecycle::mark_deleted`] when it is done.
    Begun(Exit),
    /// An earlier caller. Wait for it with [`Lifecycle::wait_deleted`].
    InProgress,
}

/// The state of one process, to read, to change and to wait for.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: watch::Sender<Phase>,
}

impl Lifecycle {
    /// For the first process of a container, whose creation has begun.
    pub(crate) fn creating() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Creating),
        }
    }

    /// For an exec, which exists as soon as it is added.
    pub(crate) fn created() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Created),
        }
    }

    /// Creating → created.
    pub(crate) fn mark_created(&self) {
        self.transition(|phase| matches!(phase, Phase::Creating).then_some(Phase::Created));
    }

    /// Creating → deleted: the creation failed.
    pub(crate) fn abandon(&self) {
        self.transition(|phase| matches!(phase, Phase::Creating).then(|| Phase::Deleted(Exit::now(UNKNOWN_STATUS))));
    }

    /// A copy; the phase can change at any time.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Created → starting. [`Self::mark_started`] or [`Self::mark_start_failed`] must follow.
    pub(crate) fn begin_start(&self) -> Result<(), WrongPhase> {
        self.try_transition("start", |phase| match phase {
            Phase::Created => Ok(Phase::Starting),
            other => Err(other),
        })
    }

    /// Starting → running.
    pub(crate) fn mark_started(&self) {
        self.transition(|phase| matches!(phase, Phase::Starting).then_some(Phase::Running));
    }

    /// Starting → stopped if there is an `exit` (an exec cannot be started again), else → created.
    pub(crate) fn mark_start_failed(&self, exit: Option<Exit>) {
        self.transition(|phase| {
            matches!(phase, Phase::Starting).then_some(exit.map_or(Phase::Created, Phase::Stopped))
        });
    }

    /// Running → paused. No-op for a process that has ended meanwhile.
    pub(crate) fn mark_paused(&self) {
        self.transition(|phase| matches!(phase, Phase::Running).then_some(Phase::Paused));
    }

    /// Paused → running. No-op for a process that has ended meanwhile.
    pub(crate) fn mark_resumed(&self) {
        self.transition(|phase| matches!(phase, Phase::Paused).then_some(Phase::Running));
    }

    /// Created, running or paused → stopped. Waits while a creation or start is in progress. Runs `announce` before
    /// the exit becomes visible. An exit that was recorded before is kept, and `announce` does not run.
    pub(crate) async fn record_exit(&self, exit: Exit, announce: impl FnOnce()) {
        let mut announce = Some(announce);
        loop {
            let done = self.transition(|phase| match phase {
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
            self.wait_for(|phase| !matches!(phase, Phase::Creating | Phase::Starting))
                .await;
        }
    }

    /// Stopped → deleting.
    ///
    /// # Errors
    ///
    /// The process has not ended.
    pub(crate) fn begin_deletion(&self) -> Result<Deletion, WrongPhase> {
        let mut begun = None;
        let refused = self.try_transition("delete", |phase| match phase {
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
            (None, _) => Ok(Deletion::InProgress),
        }
    }

    /// Deleting → deleted.
    pub(crate) fn mark_deleted(&self) {
        self.transition(|phase| match phase {
            Phase::Deleting(exit) => Some(Phase::Deleted(exit)),
            _ => None,
        });
    }

    /// Waits until the process has ended.
    pub(crate) async fn wait_exit(&self) -> Exit {
        loop {
            if let Some(exit) = self.wait_for(|phase| phase.exit().is_some()).await.exit() {
                return exit;
            }
        }
    }

    /// Waits until the process is deleted.
    pub(crate) async fn wait_deleted(&self) -> Exit {
        self.wait_for(|phase| matches!(phase, Phase::Deleted(_))).await;
        self.wait_exit().await
    }

    async fn wait_for(&self, condition: impl Fn(Phase) -> bool) -> Phase {
        let mut receiver = self.phase.subscribe();
        match receiver.wait_for(|phase| condition(*phase)).await {
            Ok(phase) => *phase,
            // The sender is a field of `self`, which is borrowed.
            Err(_) => self.phase(),
        }
    }

    /// Enters the phase that `next` returns for the current one. Returns false if `next` returned `None`.
    fn transition(&self, next: impl FnOnce(Phase) -> Option<Phase>) -> bool {
        self.phase.send_if_modified(|phase| match next(*phase) {
            Some(next) => {
                *phase = next;
                true
            }
            None => false,
        })
    }

    /// Like [`Self::transition`]; `next` returns the current phase as an error if it does not allow `action`.
    fn try_transition(
        &self,
        action: &'static str,
        next: impl FnOnce(Phase) -> Result<Phase, Phase>,
    ) -> Result<(), WrongPhase> {
        let mut refused = None;
        self.transition(|phase| next(phase).map_err(|phase| refused = Some(phase)).ok());
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

    /// The phase after `step` for each phase of [`all`].
    fn phases_after(step: impl Fn(&Lifecycle)) -> [Phase; 8] {
        all().map(|phase| {
            let lifecycle = at(phase);
            step(&lifecycle);
            lifecycle.phase()
        })
    }

    #[test]
    fn transitions_change_only_the_phases_that_allow_them() {
        use Phase::{Created, Creating, Deleted, Deleting, Paused, Running, Starting, Stopped};
        let (stopped, deleting, deleted) = (Stopped(EXIT), Deleting(EXIT), Deleted(EXIT));

        assert_eq!(
            phases_after(|lifecycle| {
                let _ = lifecycle.begin_start();
            }),
            [
                Creating, Starting, Starting, Running, Paused, stopped, deleting, deleted
            ]
        );
        assert_eq!(
            phases_after(Lifecycle::mark_created),
            [Created, Created, Starting, Running, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            phases_after(Lifecycle::mark_started),
            [Creating, Created, Running, Running, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            phases_after(|lifecycle| lifecycle.mark_start_failed(None)),
            [Creating, Created, Created, Running, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            phases_after(|lifecycle| lifecycle.mark_start_failed(Some(LATER))),
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
            phases_after(Lifecycle::mark_paused),
            [Creating, Created, Starting, Paused, Paused, stopped, deleting, deleted]
        );
        assert_eq!(
            phases_after(Lifecycle::mark_resumed),
            [
                Creating, Created, Starting, Running, Running, stopped, deleting, deleted
            ]
        );
        assert_eq!(
            phases_after(|lifecycle| {
                let _ = lifecycle.begin_deletion();
            }),
            [
                Creating, Created, Starting, Running, Paused, deleting, deleting, deleted
            ]
        );
        assert_eq!(
            phases_after(Lifecycle::mark_deleted),
            [Creating, Created, Starting, Running, Paused, stopped, deleted, deleted]
        );
    }

    #[test]
    fn refused_transition_names_action_and_phase() {
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

    /// Records `exit`, and returns whether it was announced.
    async fn record_exit(lifecycle: &Lifecycle, exit: Exit) -> bool {
        let mut announced = false;
        lifecycle.record_exit(exit, || announced = true).await;
        announced
    }

    #[tokio::test]
    async fn exit_is_recorded_once_in_every_phase_without_an_exit() {
        for phase in [Phase::Created, Phase::Running, Phase::Paused] {
            let lifecycle = at(phase);
            assert!(record_exit(&lifecycle, EXIT).await);
            assert!(!record_exit(&lifecycle, LATER).await);
            assert_eq!(lifecycle.phase(), Phase::Stopped(EXIT));
        }
        for phase in [Phase::Stopped(EXIT), Phase::Deleting(EXIT), Phase::Deleted(EXIT)] {
            let lifecycle = at(phase);
            assert!(!record_exit(&lifecycle, LATER).await);
            assert_eq!(lifecycle.phase(), phase);
        }
    }

    #[tokio::test]
    async fn exit_waits_for_a_creation_or_start_in_progress() {
        for (phase, settle) in [
            (Phase::Creating, Lifecycle::mark_created as fn(&Lifecycle)),
            (Phase::Starting, Lifecycle::mark_started),
        ] {
            let lifecycle = Arc::new(at(phase));
            let recorded = tokio::spawn({
                let lifecycle = lifecycle.clone();
                async move { record_exit(&lifecycle, EXIT).await }
            });
            tokio::task::yield_now().await;
            assert_eq!(lifecycle.phase(), phase);

            settle(&lifecycle);

            assert!(recorded.await.unwrap());
            assert_eq!(lifecycle.phase(), Phase::Stopped(EXIT));
        }
    }

    #[tokio::test]
    async fn exit_of_an_abandoned_creation_is_not_announced() {
        let lifecycle = Lifecycle::creating();
        lifecycle.abandon();
        assert!(!record_exit(&lifecycle, EXIT).await);
        assert_eq!(lifecycle.wait_exit().await.status, UNKNOWN_STATUS);
    }

    #[tokio::test]
    async fn all_waiters_get_the_exit_before_and_after_it_happened() {
        let lifecycle = Arc::new(Lifecycle::created());
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let lifecycle = lifecycle.clone();
                tokio::spawn(async move { lifecycle.wait_exit().await })
            })
            .collect();
        record_exit(&lifecycle, EXIT).await;
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), EXIT);
        }
        assert_eq!(lifecycle.wait_exit().await, EXIT);
    }

    #[test]
    fn second_caller_finds_the_deletion_in_progress() {
        let lifecycle = at(Phase::Stopped(EXIT));
        assert_eq!(lifecycle.begin_deletion(), Ok(Deletion::Begun(EXIT)));
        assert_eq!(lifecycle.begin_deletion(), Ok(Deletion::InProgress));
    }
}
