//! What TLS needs of an identity, made anew when the identity's files were replaced.

use std::time::{Duration, Instant};

use crate::LinkError;
use crate::pki::Identity;

/// The files are looked at no more often than this.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A configuration that is as new as the identity's files.
pub(crate) struct Fresh<C> {
    identity: Identity,
    config: C,
    make: fn(&Identity) -> Result<C, LinkError>,
    looked: Instant,
    /// Why files could not be used, said last.
    said: Option<String>,
}

impl<C: Clone> Fresh<C> {
    pub(crate) fn new(
        identity: &Identity,
        make: fn(&Identity) -> Result<C, LinkError>,
    ) -> Result<Self, LinkError> {
        let (identity, config) = (identity.clone(), make(identity)?);
        Ok(Self { identity, config, make, looked: Instant::now(), said: None })
    }

    /// For a connection that is made now. Files that cannot be used change nothing: they may be half replaced.
    pub(crate) fn config(&mut self) -> C {
        if self.looked.elapsed() >= LOOK_EVERY {
            self.looked = Instant::now();
            self.renew();
        }
        self.config.clone()
    }

    fn renew(&mut self) {
        let Some(renewed) = self.identity.renewed() else { return };
        let made = renewed.map_err(|e| e.to_string()).and_then(|identity| {
            let config = (self.make)(&identity).map_err(|e| e.to_string())?;
            Ok((identity, config))
        });
        match made {
            Ok((identity, config)) => {
                tracing::info!("new connections use the renewed identity `{}`", identity.name());
                (self.identity, self.config, self.said) = (identity, config, None);
            }
            Err(why) => {
                if self.said.as_ref() != Some(&why) {
                    tracing::warn!("the identity that was read before stays in use: {why}");
                }
                self.said = Some(why);
            }
        }
    }
}
