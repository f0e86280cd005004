//! Which of a shard's state databases counts, so that a snapshot takes its place at once or not at
//! all, at every crash, while readers still hold the old one: nothing that is open is ever renamed.
//!
//! ```text
//! state/<shard>/GENERATION   "7\n", replaced whole: temporary file, fsync, rename, fsync of the directory
//! state/<shard>/7/           what counts
//! state/<shard>/8/           received, moved here, opened to see that it is whole; counts once GENERATION says 8
//! ```
//! A crash before GENERATION changed leaves 8, after it leaves 7: on open, whatever is not pointed
//! to is removed. While the process lives, 7 goes when the last handle to it does. Numbers only
//! grow. Must never know what is in a database.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::store::durable;

const POINTER: &str = "GENERATION";

/// The state directory of one shard.
pub(super) struct Generations {
    root: PathBuf,
}

impl Generations {
    /// The generation of an empty state, made when there is none.
    pub(super) const FIRST: u64 = 1;

    /// Takes the directory as a crash may have left it, and says which generation counts.
    pub(super) fn open(root: PathBuf) -> io::Result<(Self, u64)> {
        let generations = Self::at(root)?;
        let current = match generations.current()? {
            Some(current) => current,
            None => generations.begin()?,
        };
        for leftover in generations
            .present()?
            .into_iter()
            .filter(|number| *number != current)
        {
            generations.discard(leftover)?;
        }
        if current != Self::FIRST && !generations.path(current).is_dir() {
            return Err(damaged(format!(
                "{} is missing, and {POINTER} points to it",
                generations.path(current).display()
            )));
        }
        Ok((generations, current))
    }

    /// The directory, made if needed, with everything in it left alone.
    pub(super) fn at(root: PathBuf) -> io::Result<Self> {
        durable::create_directory(&root)?;
        Ok(Self { root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, number: u64) -> PathBuf {
        self.root.join(number.to_string())
    }

    /// What GENERATION says, if it is there.
    pub(super) fn current(&self) -> io::Result<Option<u64>> {
        let path = self.root.join(POINTER);
        match fs::read_to_string(&path) {
            Ok(text) => match text
                .strip_suffix('\n')
                .and_then(|number| number.parse().ok())
            {
                Some(number) => Ok(Some(number)),
                None => Err(damaged(format!(
                    "{} does not hold a number",
                    path.display()
                ))),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(durable::named(error, "read", &path)),
        }
    }

    /// Moves a received directory in as the generation after the current one. It does not count
    /// yet.
    pub(super) fn adopt(&self, from_dir: &Path, current: Option<u64>) -> io::Result<u64> {
        let next = current.map_or(Self::FIRST, |current| current + 1);
        durable::remove_directory(&self.path(next))?;
        fs::rename(from_dir, self.path(next))
            .map_err(|error| durable::named(error, "install", from_dir))?;
        durable::sync_parent(from_dir)?;
        durable::sync_directory(&self.root)?;
        Ok(next)
    }

    /// From here on, for ever, that generation counts.
    pub(super) fn point_to(&self, number: u64) -> io::Result<()> {
        durable::replace_file(&self.root.join(POINTER), format!("{number}\n").as_bytes())
    }

    pub(super) fn discard(&self, number: u64) -> io::Result<()> {
        durable::remove_directory(&self.path(number))
    }

    /// Points before the first database is made: databases without a pointer are therefore a loss,
    /// and never thrown away.
    fn begin(&self) -> io::Result<u64> {
        if !self.present()?.is_empty() {
            return Err(damaged(format!(
                "{} holds databases but no {POINTER}",
                self.root.display()
            )));
        }
        self.point_to(Self::FIRST)?;
        Ok(Self::FIRST)
    }

    fn present(&self) -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            numbers.extend(
                entry?
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<u64>().ok()),
            );
        }
        Ok(numbers)
    }
}

fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(generations: &[u64]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        generations
            .iter()
            .for_each(|number| fs::create_dir(root.path().join(number.to_string())).unwrap());
        root
    }

    #[test]
    fn what_is_not_pointed_to_is_removed() {
        for (pointer, kept, gone) in [("7\n", "7", "8"), ("8\n", "8", "7")] {
            let root = holding(&[7, 8]);
            fs::write(root.path().join(POINTER), pointer).unwrap();
            fs::write(root.path().join("GENERATION.new"), "torn").unwrap();
            let (_, current) = Generations::open(root.path().to_owned()).unwrap();
            assert_eq!(current.to_string(), kept);
            assert!(root.path().join(kept).is_dir() && !root.path().join(gone).exists());
        }
    }

    #[test]
    fn databases_without_a_pointer_are_not_thrown_away() {
        let root = holding(&[1]);
        assert!(Generations::open(root.path().to_owned()).is_err());
        assert!(root.path().join("1").is_dir());
    }

    #[test]
    fn a_pointer_to_nothing_is_an_error() {
        let root = holding(&[]);
        for pointer in ["7\n", "seven\n", "", "7"] {
            fs::write(root.path().join(POINTER), pointer).unwrap();
            assert!(
                Generations::open(root.path().to_owned()).is_err(),
                "{pointer:?}"
            );
        }
    }

    #[test]
    fn an_adopted_directory_counts_once_it_is_pointed_to() {
        let root = holding(&[]);
        let (generations, current) = Generations::open(root.path().join("state")).unwrap();
        fs::create_dir(generations.path(current)).unwrap();
        let incoming = root.path().join("incoming");
        fs::create_dir(&incoming).unwrap();

        let next = generations.adopt(&incoming, Some(current)).unwrap();
        assert_eq!(generations.current().unwrap(), Some(current));
        generations.point_to(next).unwrap();
        let (generations, found) = Generations::open(generations.root().to_owned()).unwrap();
        assert_eq!(found, next);
        assert!(!generations.path(current).exists());
    }
}
