//! Remembers that a store failed to write. After a failed sync nobody knows what the disk holds,
//! and trying again may wrongly succeed, so every later call fails with the first reason. Must
//! never heal: only a restart, which reads the disk anew, does.

use std::io;
use std::sync::OnceLock;

/// Empty until the first failed write.
#[derive(Debug, Default)]
pub(super) struct Poison {
    reason: OnceLock<String>,
}

impl Poison {
    pub(super) fn check(&self) -> io::Result<()> {
        match self.reason.get() {
            None => Ok(()),
            Some(reason) => Err(io::Error::other(format!(
                "the store stopped after a failed write: {reason}"
            ))),
        }
    }

    /// Passes the result of a write on and remembers its failure.
    pub(super) fn watch<T>(&self, written: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &written {
            self.reason.get_or_init(|| error.to_string());
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_told_for_ever() {
        let poison = Poison::default();
        assert!(poison.watch(Ok(1)).is_ok());
        assert!(poison.check().is_ok());

        assert!(
            poison
                .watch::<()>(Err(io::Error::other("disk on fire")))
                .is_err()
        );
        assert!(
            poison
                .watch::<()>(Err(io::Error::other("disk is ash")))
                .is_err()
        );

        let told = poison.check().expect_err("poisoned").to_string();
        assert!(told.contains("disk on fire"), "{told}");
        assert!(poison.watch(Ok(1)).is_ok());
        assert!(poison.check().is_err());
    }
}
