package fprint

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/godbus/dbus/v5"
)

// Feedback is what to tell the person at the reader. The zero value is nothing.
type Feedback int

// What is told.
const (
	Touch     Feedback = 1 // put a finger on the reader
	Again     Feedback = 2 // swipe or touch again: the picture was no good
	Stage     Feedback = 3 // enrolment: one picture more was taken
	NoMatch   Feedback = 4 // a finger, but none of the user's
	Matched   Feedback = 5
	Enrolled  Feedback = 6
	Duplicate Feedback = 7 // this finger is enrolled already
)

// What ends an operation without success.
var (
	ErrNoMatch   = errors.New("the finger is none that is enrolled")
	ErrNoPrints  = errors.New("no finger is enrolled")
	ErrEnrolment = errors.New("the finger was not enrolled")
)

// object returns the first reader's object.
func (r *Reader) object(ctx context.Context) (dbus.BusObject, error) {
	var path dbus.ObjectPath
	if err := r.conn.Object(service, root).CallWithContext(ctx, manager+".GetDefaultDevice", 0).Store(&path); err != nil {
		if named(err, "NoSuchDevice") {
			return nil, ErrNoReader
		}
		return nil, fmt.Errorf("fingerprint reader: %w", err)
	}
	return r.conn.Object(service, path), nil
}

// named reports whether err is fprintd's error of a name.
func named(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == service+".Error."+name
}

// claim takes the reader for user; release gives it back.
func (r *Reader) claim(ctx context.Context, user string) (o dbus.BusObject, release func(), err error) {
	select {
	case <-r.turn:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	back := func() { r.turn <- struct{}{} }
	if o, err = r.object(ctx); err != nil {
		back()
		return nil, nil, err
	}
	if err := o.CallWithContext(ctx, device+".Claim", 0, user).Err; err != nil {
		back()
		return nil, nil, fmt.Errorf("fingerprint reader: claim: %w", err)
	}
	return o, func() {
		o.Call(device+".Release", 0)
		back()
	}, nil
}

// signals subscribes to a signal of the reader.
func (r *Reader) signals(o dbus.BusObject, name string) (<-chan *dbus.Signal, func(), error) {
	match := []dbus.MatchOption{dbus.WithMatchObjectPath(o.Path()), dbus.WithMatchInterface(device), dbus.WithMatchMember(name)}
	if err := r.conn.AddMatchSignal(match...); err != nil {
		return nil, nil, fmt.Errorf("fingerprint reader: %w", err)
	}
	c := make(chan *dbus.Signal, 16)
	r.conn.Signal(c)
	return c, func() {
		r.conn.RemoveSignal(c)
		_ = r.conn.RemoveMatchSignal(match...)
	}, nil
}

// next waits for the signal's next status.
func next(ctx context.Context, r *Reader, c <-chan *dbus.Signal, name string) (status string, done bool, err error) {
	for {
		select {
		case <-ctx.Done():
			return "", false, ctx.Err()
		case <-r.Done():
			return "", false, errors.New("fingerprint reader: fprintd has ended")
		case s := <-c:
			if s == nil || s.Name != device+"."+name {
				continue
			}
			if err := dbus.Store(s.Body, &status, &done); err != nil {
				return "", false, fmt.Errorf("fingerprint reader: %s: %w", name, err)
			}
			return status, done, nil
		}
	}
}

// Verify waits until ctx ends for one finger of user. nil: it matched.
// ErrNoMatch: another one was there. tell may be called several times before.
func (r *Reader) Verify(ctx context.Context, user string, tell func(Feedback)) error {
	o, release, err := r.claim(ctx, user)
	if err != nil {
		return err
	}
	defer release()
	c, unsubscribe, err := r.signals(o, "VerifyStatus")
	if err != nil {
		return err
	}
	defer unsubscribe()
	if err := o.CallWithContext(ctx, device+".VerifyStart", 0, "any").Err; err != nil {
		if named(err, "NoEnrolledPrints") {
			return ErrNoPrints
		}
		return fmt.Errorf("fingerprint reader: verify: %w", err)
	}
	defer o.Call(device+".VerifyStop", 0)
	tell(Touch)
	for {
		status, done, err := next(ctx, r, c, "VerifyStatus")
		switch {
		case err != nil:
			return err
		case status == "verify-match":
			tell(Matched)
			return nil
		case status == "verify-no-match":
			tell(NoMatch)
			return ErrNoMatch
		case strings.HasPrefix(status, "verify-retry") || status == "verify-swipe-too-short" || status == "verify-finger-not-centered" || status == "verify-remove-and-retry":
			tell(Again)
		case done:
			return fmt.Errorf("fingerprint reader: %s", status)
		}
	}
}

// Enrol takes the pictures of a new finger of user, such as
// "right-index-finger" (fprintd's names).
func (r *Reader) Enrol(ctx context.Context, user, finger string, tell func(Feedback)) error {
	o, release, err := r.claim(ctx, user)
	if err != nil {
		return err
	}
	defer release()
	c, unsubscribe, err := r.signals(o, "EnrollStatus")
	if err != nil {
		return err
	}
	defer unsubscribe()
	if err := o.CallWithContext(ctx, device+".EnrollStart", 0, finger).Err; err != nil {
		return fmt.Errorf("fingerprint reader: enrol: %w", err)
	}
	defer o.Call(device+".EnrollStop", 0)
	tell(Touch)
	for {
		status, done, err := next(ctx, r, c, "EnrollStatus")
		switch {
		case err != nil:
			return err
		case status == "enroll-completed":
			tell(Enrolled)
			return nil
		case status == "enroll-stage-passed":
			tell(Stage)
		case status == "enroll-duplicate":
			tell(Duplicate)
			return fmt.Errorf("%w: it is enrolled already", ErrEnrolment)
		case done:
			return fmt.Errorf("%w: %s", ErrEnrolment, status)
		default:
			tell(Again)
		}
	}
}

// Fingers lists the fingers of user that are enrolled.
func (r *Reader) Fingers(ctx context.Context, user string) ([]string, error) {
	o, err := r.object(ctx)
	if err != nil {
		return nil, err
	}
	var list []string
	if err := o.CallWithContext(ctx, device+".ListEnrolledFingers", 0, user).Store(&list); err != nil {
		if named(err, "NoEnrolledPrints") {
			return nil, nil
		}
		return nil, fmt.Errorf("fingerprint reader: list: %w", err)
	}
	return list, nil
}

// Delete deletes one finger of user.
func (r *Reader) Delete(ctx context.Context, user, finger string) error {
	o, release, err := r.claim(ctx, user)
	if err != nil {
		return err
	}
	defer release()
	if err := o.CallWithContext(ctx, device+".DeleteEnrolledFinger", 0, finger).Err; err != nil {
		return fmt.Errorf("fingerprint reader: delete: %w", err)
	}
	return nil
}
