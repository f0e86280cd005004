//! A disk whose syncs take long: a library that is loaded before the program and waits in every
//! `fsync` and `fdatasync` for as long as a file says then. Compiled by the C compiler that the engine needs anyway.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static void wait_for_the_disk(void) {
    int ms = 0;
    const char *path = getenv("SLOW_DISK_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return;
    if (fscanf(file, "%d", &ms) == 1 && ms > 0) usleep(1000 * ms);
    fclose(file);
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
    delay: PathBuf,
}

impl SlowDisk {
    /// As fast as it is.
    pub fn build(dir: &Path) -> anyhow::Result<Self> {
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
        let delay = dir.join("slow_disk_ms");
        std::fs::write(&delay, "0")?;
        Ok(Self { library, delay })
    }

    /// What each sync waits from now on.
    pub fn wait(&self, each: Duration) -> anyhow::Result<()> {
        let new = self.delay.with_extension("new");
        std::fs::write(&new, each.as_millis().to_string())?;
        Ok(std::fs::rename(new, &self.delay)?)
    }

    /// What a node is started behind.
    pub fn wrapper(&self) -> [String; 3] {
        [
            "env".into(),
            format!("LD_PRELOAD={}", self.library.display()),
            format!("SLOW_DISK_FILE={}", self.delay.display()),
        ]
    }
}
