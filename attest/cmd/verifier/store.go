package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"sekisho/attest/fleet"
	"sekisho/attest/store"
)

// openStore opens the store of a configuration.
func openStore(ctx context.Context, path string, log *slog.Logger) (*store.Store, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	config, err := fleet.ParseServerConfig(data)
	if err != nil {
		return nil, err
	}
	return config.OpenStore(ctx, log)
}

// backup writes a new file with all records, readable by its owner alone.
func backup(ctx context.Context, config, file string, log *slog.Logger) (err error) {
	s, err := openStore(ctx, config, log)
	if err != nil {
		return fmt.Errorf("%w (of a verifier that runs: attestctl store backup FILE)", err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	b, err := s.Backup(ctx, f, time.Now())
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(file))
	}
	_, err = fmt.Printf("%d records, as of %s\n", b.Records, b.Time.Format(time.RFC3339))
	return err
}

func restore(ctx context.Context, config, file string, log *slog.Logger) (err error) {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	// A damaged backup is found before anything is made.
	if _, err := store.ReadBackup(f, func(string, []byte) error { return nil }); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	s, err := openStore(ctx, config, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	b, err := s.Restore(ctx, f)
	if err != nil {
		return err
	}
	_, err = fmt.Printf("%d records, as of %s; what was retired or revoked since must be so again\n", b.Records, b.Time.Format(time.RFC3339))
	return err
}

func move(ctx context.Context, config, to string, log *slog.Logger) (err error) {
	from, err := openStore(ctx, config, log)
	if err != nil {
		return fmt.Errorf("%w (stop the verifier first)", err)
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	next, err := openStore(ctx, to, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, next.Close()) }()
	n, err := from.Move(ctx, next, to, time.Now())
	if err != nil {
		return err
	}
	_, err = fmt.Printf("%d records moved and compared; start the verifiers with %s\n", n, to)
	return err
}
