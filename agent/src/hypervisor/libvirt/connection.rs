//! Calls to libvirt that do not block the flow: each on a thread of its own, with a deadline, and once
//! more where libvirtd was started anew meanwhile.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virt::connect::Connect;
use virt::domain::{Domain, DomainPausedReason, DomainStateReason, DomainStateReasonEnum};
use virt::error::Error;

use super::{sys, xml};
use crate::effect;
use crate::hypervisor::{DomainAddress, HypervisorError};

/// How long libvirt may take to answer. A call may wait for another one on the same domain, which
/// libvirt itself allows for 30 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long libvirtd may stay away; its guests go on meanwhile.
const RESTART_TIMEOUT: Duration = Duration::from_secs(30);
const RESTART_POLL: Duration = Duration::from_millis(100);

/// A connection to libvirt that outlives a restart of libvirtd.
#[derive(Debug, Clone)]
pub struct Libvirt {
    uri: String,
    connection: Arc<Mutex<Connect>>,
}

impl Libvirt {
    /// Connects.
    ///
    /// # Errors
    /// [`HypervisorError::Connect`].
    pub async fn connect(uri: &str) -> Result<Self, HypervisorError> {
        sys::silence();
        let connection = open(uri.to_owned()).await?;
        Ok(Self { uri: uri.to_owned(), connection: Arc::new(Mutex::new(connection)) })
    }

    /// Asks libvirt, again where the connection broke. `step` completes the sentence "libvirt refused
    /// to …".
    ///
    /// # Errors
    /// [`HypervisorError::Libvirt`], [`HypervisorError::Connect`], [`HypervisorError::Silent`].
    pub async fn ask<T: Send + 'static>(
        &self,
        step: &str,
        work: impl Fn(&Connect) -> Result<T, Error> + Clone + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let attempt = || {
            let (connection, work) = (self.current(), work.clone());
            on_a_thread(step, move || work(&connection))
        };
        let failed = match attempt().await? {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if !self.is_lost().await {
            return Err(HypervisorError::Libvirt { step: step.to_owned(), source: failed.into() });
        }
        self.reconnect().await?;
        let answer = attempt().await?;
        answer.map_err(|error| HypervisorError::Libvirt {
            step: step.to_owned(),
            source: error.into(),
        })
    }

    fn current(&self) -> Connect {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn is_lost(&self) -> bool {
        let connection = self.current();
        let alive = on_a_thread("say whether it is there", move || connection.is_alive()).await;
        !matches!(alive, Ok(Ok(true)))
    }

    async fn reconnect(&self) -> Result<(), HypervisorError> {
        tracing::warn!("the connection to libvirt broke: connecting again");
        let start = Instant::now();
        loop {
            match open(self.uri.clone()).await {
                Ok(connection) => {
                    *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = connection;
                    return Ok(());
                }
                Err(error) if start.elapsed() > RESTART_TIMEOUT => return Err(error),
                Err(_) => tokio::time::sleep(RESTART_POLL).await,
            }
        }
    }

    /// The domain with this uuid, whether or not it exists.
    pub fn domain(&self, uuid: &str) -> DomainHandle {
        DomainHandle { libvirt: self.clone(), uuid: uuid.to_owned() }
    }
}

async fn open(uri: String) -> Result<Connect, HypervisorError> {
    let opened = uri.clone();
    let connection = on_a_thread("open a connection", move || Connect::open(Some(&opened))).await?;
    connection.map_err(|error| HypervisorError::Connect { uri, source: error.into() })
}

/// Runs what blocks on a thread that nobody waits for at the end of the program: a libvirtd that hangs
/// keeps it, and not us.
async fn on_a_thread<T: Send + 'static>(
    step: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HypervisorError> {
    let (done, answer) = tokio::sync::oneshot::channel();
    let spawned = std::thread::Builder::new().name("libvirt".into()).spawn(move || {
        // Nobody listens any more after the deadline.
        let _ = done.send(work());
    });
    spawned
        .map_err(|source| HypervisorError::Host { step: "start a thread".to_owned(), source })?;
    let silent = || HypervisorError::Silent { step: step.to_owned(), waited: ANSWER_TIMEOUT };
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        _ => Err(silent()),
    }
}

/// One domain of libvirt.
#[derive(Debug, Clone)]
pub struct DomainHandle {
    libvirt: Libvirt,
    uuid: String,
}

impl DomainHandle {
    /// Connects to libvirt.
    ///
    /// # Errors
    /// [`HypervisorError::Connect`].
    pub async fn connect(address: &DomainAddress) -> Result<Self, HypervisorError> {
        Ok(Libvirt::connect(&address.uri).await?.domain(&address.uuid))
    }

    /// The libvirt that has it.
    pub fn libvirt(&self) -> &Libvirt {
        &self.libvirt
    }

    /// Where it is.
    pub fn address(&self) -> DomainAddress {
        DomainAddress { uri: self.libvirt.uri.clone(), uuid: self.uuid.clone() }
    }

    /// The domain as libvirt describes it; one that runs as it runs.
    ///
    /// # Errors
    /// As [`Libvirt::ask`], [`HypervisorError::Xml`].
    pub async fn describe(&self) -> Result<xml::Domain, HypervisorError> {
        let text = self.ask("describe the domain", |domain| domain.xml_desc(0)).await?;
        Ok(xml::read_domain(&xml::parse(&text).map_err(HypervisorError::Xml)?))
    }

    /// Whether a QEMU runs for the domain.
    ///
    /// # Errors
    /// As [`Libvirt::ask`].
    pub async fn is_active(&self) -> Result<bool, HypervisorError> {
        self.ask("tell whether the domain runs", Domain::is_active).await
    }

    /// Lets a paused guest go on. One that stands still for any other reason is left alone.
    ///
    /// # Errors
    /// As [`Libvirt::ask`].
    pub async fn let_go_on(&self) -> Result<(), HypervisorError> {
        let (_, reason) = self.ask("tell its state", Domain::state).await?;
        let by_a_user = DomainStateReason::Paused(DomainPausedReason::User.into());
        match reason == DomainStateReasonEnum::from(by_a_user) {
            true => self.change("let the guest go on", Domain::resume).await,
            false => Ok(()),
        }
    }

    /// Asks about the domain; changes nothing.
    ///
    /// # Errors
    /// As [`Libvirt::ask`].
    pub async fn ask<T: Send + 'static>(
        &self,
        step: &str,
        work: impl Fn(&Domain) -> Result<T, Error> + Clone + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let uuid = self.uuid.clone();
        let work =
            move |connection: &Connect| work(&connection.lookup_domain_by_uuid_string(&uuid)?);
        self.libvirt.ask(step, work).await
    }

    /// Changes the domain by a call that may be made twice.
    ///
    /// # Errors
    /// As [`Libvirt::ask`].
    pub async fn change<T: Send + 'static>(
        &self,
        step: &str,
        work: impl Fn(&Domain) -> Result<T, Error> + Clone + Send + 'static,
    ) -> Result<T, HypervisorError> {
        // Without the name of what is changed, which is another one each time.
        let what = step.split('`').next().unwrap_or(step).trim_end();
        effect::about_to(&format!("libvirt: {what}"))
            .map_err(|source| HypervisorError::Host { step: step.to_owned(), source })?;
        self.ask(step, work).await
    }
}
