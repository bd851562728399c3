//! A name server.
