//! A guest whose images hold still while they are read, as by `create` and `purge`.

use std::future::Future;
use std::path::Path;
use std::pin::pin;

use jiff::Timestamp;

use crate::capture::image::Chain;
use crate::capture::overlay::{folders, frozen, room_ends};
use crate::error::CommandError;
use crate::guard::Guard;
use crate::hypervisor::{HypervisorError, Machine, Reach};
use crate::journal::{Journal, Phase, Record};
use crate::names::{DomainName, RunId};
use crate::overlay::converge::Budget;
use crate::overlay::create::{self, Request};
use crate::overlay::purge::Purge;
use crate::overlay::record::{Held, Records};
use crate::overlay::{Layers, OverlayError};
use crate::progress::Progress;
use crate::read::processors;

/// A machine that runs, and what is needed to have its images hold still.
#[derive(Debug)]
pub struct Hold<'a, L> {
    /// The way to its images.
    pub layers: &'a L,
    /// The records of overlays.
    pub records: &'a Records,
    /// What a killed process leaves to its guard.
    pub journal: &'a Journal,
    /// Where locks are.
    pub run_dir: &'a Path,
    /// The machine.
    pub machine: &'a Machine,
    /// Its name.
    pub domain: &'a DomainName,
    /// How it is reached.
    pub reach: &'a Reach,
    /// How it is done.
    pub request: &'a Request,
    /// How long the guest may take on its way back.
    pub budget: Budget,
    /// Who is told how far it is.
    pub progress: &'a Progress,
}

impl<L: Layers> Hold<'_, L> {
    /// Reads the images while they hold still; `look` is called in the instant that they show. The guest is
    /// brought back whatever comes of it, and by its guard if this process is killed. When `end` is ready
    /// the reading ends. Where bringing it back takes long, that is waited for until what `again` returns is
    /// ready.
    ///
    /// Also returns whether the guest was brought back: what was read is good even if not.
    ///
    /// # Errors
    /// Whatever keeps the images from holding still, that of `read`, or what `end` says.
    pub async fn read<T, A: Future<Output = ()>>(
        &self,
        look: impl AsyncFnOnce(),
        read: impl AsyncFnOnce(&Held, &[Chain]) -> Result<T, CommandError>,
        end: impl Future<Output = CommandError>,
        again: impl FnOnce() -> A,
    ) -> Result<(T, Result<(), OverlayError>), CommandError> {
        let recorded = self.journal.begin(self.undo_record())?;
        let start = Guard::start(self.journal, self.run_dir, &recorded.record().run);
        let guard = match start {
            Ok(guard) => guard,
            Err(source) => {
                self.journal.clear(&recorded)?;
                let step = "run the guard that lets go of the guest".to_owned();
                return Err(HypervisorError::Host { step, source }.into());
            }
        };
        let outcome = self.guarded(look, read, end, again).await;
        // What is left of the overlays has a record of its own.
        self.journal.clear(&recorded)?;
        guard.dismiss();
        outcome
    }

    async fn guarded<T, A: Future<Output = ()>>(
        &self,
        look: impl AsyncFnOnce(),
        read: impl AsyncFnOnce(&Held, &[Chain]) -> Result<T, CommandError>,
        end: impl Future<Output = CommandError>,
        again: impl FnOnce() -> A,
    ) -> Result<(T, Result<(), OverlayError>), CommandError> {
        let Self { layers, records, machine, request, .. } = *self;
        let (domain, reach) = (self.domain.clone(), self.reach.clone());
        self.progress.phase("having the images hold still");
        let created = create::create(layers, records, machine, domain, reach, request, look);
        let (held, warnings) = created.await?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let folders = folders(&held);
        // The tools that read take over what this process keeps to.
        processors::give_way(true);
        let outcome = tokio::select! {
            outcome = read_still(layers, &held, read) => outcome,
            error = room_ends(&folders) => Err(error.into()),
            error = end => Err(error),
        };
        processors::give_way(false);
        self.progress.phase("bringing the guest back");
        let (budget, progress) = (self.budget, self.progress);
        let purge = Purge { layers, records, budget, progress };
        let brought = purge.run(held, pin!(again())).await.map(drop);
        if let (Err(_), Err(error)) = (&outcome, &brought) {
            let error: &dyn std::error::Error = error;
            tracing::error!(error, "the guest still writes to overlays; `kvmsnap purge` ends that");
        }
        Ok((outcome?, brought))
    }

    fn undo_record(&self) -> Record {
        Record {
            run: RunId::random(),
            pid: std::process::id(),
            started: Timestamp::now(),
            domain: self.domain.clone(),
            uuid: self.machine.uuid.clone(),
            reach: self.reach.clone(),
            qemu: self.layers.process(),
            // Its watchdog thaws a guest that is frozen for the instant.
            agent: None,
            repository_id: String::new(),
            phase: Phase::Capturing,
            guest_runs: self.machine.runs,
            holds_guest: false,
            pauses: false,
            suspends: false,
            stopped: None,
            snapshots: Vec::new(),
            nbd_server: false,
            overlays: true,
            socket: None,
            disks: Vec::new(),
        }
    }
}

/// Reads images that hold still already, and makes sure that nobody wrote to them meanwhile.
///
/// # Errors
/// [`OverlayError::NotStill`], and that of `read`.
pub async fn read_still<T>(
    layers: &impl Layers,
    held: &Held,
    read: impl AsyncFnOnce(&Held, &[Chain]) -> Result<T, CommandError>,
) -> Result<T, CommandError> {
    let chains = frozen(layers, held).await?;
    let read = read(held, &chains).await?;
    match create::holds_still(layers, held).await? {
        true => Ok(read),
        false => Err(OverlayError::NotStill { domain: held.record().domain.clone() }.into()),
    }
}
