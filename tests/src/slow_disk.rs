//! A disk whose syncs take long: a library that is loaded before the program and waits in every
//! `fsync` and `fdatasync`. Compiled by the C compiler that the engine needs anyway.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
static void wait_for_the_disk(void) {
    const char *ms = getenv("SLOW_DISK_MS");
    if (ms) usleep(1000 * atoi(ms));
}
int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_for_the_disk();
    return real(fd);
}
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    wait_for_the_disk();
    return real(fd);
}
"#;

pub struct SlowDisk {
    library: PathBuf,
    sync: Duration,
}

impl SlowDisk {
    pub fn build(dir: &Path, sync: Duration) -> anyhow::Result<Self> {
        let (source, library) = (dir.join("slow_disk.c"), dir.join("slow_disk.so"));
        std::fs::write(&source, SOURCE)?;
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .output()
            .context("cc")?;
        ensure!(
            compiled.status.success(),
            "cc: {}",
            String::from_utf8_lossy(&compiled.stderr)
        );
        Ok(Self { library, sync })
    }

    /// What a node is started behind.
    pub fn wrapper(&self) -> [String; 3] {
        [
            "env".into(),
            format!("LD_PRELOAD={}", self.library.display()),
            format!("SLOW_DISK_MS={}", self.sync.as_millis()),
        ]
    }
}
