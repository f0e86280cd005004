//! The command line `holdfast`. All of it is in the library, so that other binaries can be it too.

fn main() -> std::process::ExitCode {
    holdfast_client::cli::main()
}
