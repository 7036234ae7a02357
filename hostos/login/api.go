package login

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"

	"sekisho/attest/gate"
	"sekisho/hostos/login/fprint"
)

// Status is what GET /v1/status answers.
type Status struct {
	State    string    `json:"state"` // "ready", "touch", "removed", "not-set-up"
	Since    time.Time `json:"since"`
	Reason   Reason    `json:"reason"` // empty when all is well
	Detail   string    `json:"detail"` // one sentence, Japanese and English
	User     string    `json:"user"`
	Inserted bool      `json:"inserted"` // the card is in the work domain's reader
	Reader   bool      `json:"reader"`   // there is a fingerprint reader
	Fingers  int       `json:"fingers"`  // templates
	PINLeft  int       `json:"pin_left"`
	Bound    bool      `json:"bound"`  // the key is bound to the release's policy
	Events   []Event   `json:"events"` // the newest last
}

// feedback is what the person is told, Japanese and English.
var feedback = map[fprint.Feedback][2]string{
	fprint.Touch:     {"指紋センサーに指を置いてください。", "put your finger on the reader"},
	fprint.Again:     {"もう一度、指を置いてください。", "touch or swipe again"},
	fprint.Stage:     {"読み取りました。もう一度、指を置いてください。", "taken; touch once more"},
	fprint.NoMatch:   {"登録された指紋と一致しません。", "this finger does not match"},
	fprint.Matched:   {"一致しました。", "matched"},
	fprint.Enrolled:  {"指紋を登録しました。", "the finger is enrolled"},
	fprint.Duplicate: {"この指紋はすでに登録されています。", "this finger is enrolled already"},
}

// feedbackAge is how long what was told is news.
const feedbackAge = 30 * time.Second

// Status says how things stand.
func (e *Engine) Status() Status {
	st := e.store.get()
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.Now()
	s := Status{
		State: "ready", Since: e.attested.Since, User: st.User, Inserted: e.Slot.Inserted(), Reader: e.reader != nil,
		Fingers: len(st.Prints), PINLeft: e.pin.Left(), Bound: st.Key != nil && st.Key.Bound, Events: st.Events,
	}
	if len(st.Chain) == 0 {
		s.State, s.Reason = string(NotSet), NotSet
	}
	if _, open := gate.Open(e.attested, gate.Logon, now); !open {
		s.State, s.Reason = "removed", NotAttested
	}
	ja, en := Open.Words()
	if s.Reason != "" {
		ja, en = s.Reason.Words()
	} else if w, ok := feedback[e.say.Feedback]; ok && now.Sub(e.say.Since) < feedbackAge {
		ja, en, s.Since = w[0], w[1], e.say.Since
		if slices.Contains([]fprint.Feedback{fprint.Touch, fprint.Again, fprint.Stage}, e.say.Feedback) {
			s.State = "touch"
		}
	} else if n := len(st.Events); n > 0 && st.Events[n-1].Reason != Open && now.Sub(st.Events[n-1].Time) < feedbackAge {
		s.Reason = st.Events[n-1].Reason
		ja, en = s.Reason.Words()
	}
	s.Detail = en + " / " + ja
	return s
}

// Line is a status in one line for the console; its first word is the state.
func (s Status) Line() string {
	if s.User == "" {
		return s.State + " " + s.Detail
	}
	return s.State + " " + s.User + ": " + s.Detail
}

// Changed is closed at the next change of status.
func (e *Engine) Changed() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.change
}

// Command is the body of POST /v1/admin: one of the administrator's actions.
type Command struct {
	Do      string `json:"do"` // "setup", "request", "import", "pin", "enrol", "delete", "pin-only"
	User    string `json:"user,omitempty"`
	Name    string `json:"name,omitempty"`
	PIN     string `json:"pin,omitempty"`
	Finger  string `json:"finger,omitempty"`
	Chain   string `json:"chain,omitempty"` // PEM
	Minutes int    `json:"minutes,omitempty"`
}

// Limits of logind's socket.
const (
	maxClients = 16
	maxBody    = 64 << 10
	enrolTime  = 2 * time.Minute // of one administrator's action
)

// Admin does one action. What it answers is for people, or PEM.
func (e *Engine) Admin(ctx context.Context, c Command) (any, error) {
	switch c.Do {
	case "setup":
		if _, err := e.Setup(ctx, c.User, c.Name); err != nil {
			return nil, err
		}
		return e.Request(ctx)
	case "request":
		return e.Request(ctx)
	case "import":
		return "imported", e.Import(ctx, []byte(c.Chain))
	case "pin":
		return "the PIN is set", e.SetPIN(c.PIN)
	case "enrol":
		return "enrolled", e.Enrol(ctx, c.Finger)
	case "delete":
		return "deleted", e.DeleteFinger(ctx, c.Finger)
	case "pin-only":
		until := e.Now().Add(time.Duration(c.Minutes) * time.Minute)
		return "until " + until.UTC().Format(time.RFC3339), e.AllowPINOnly(ctx, until)
	}
	return nil, fmt.Errorf("action %q: want setup, request, import, pin, enrol, delete or pin-only", c.Do)
}

// Serve answers on l, a unix socket, until ctx ends. Root and logind's own user
// are heard.
func (e *Engine) Serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, e.Status()) })
	mux.HandleFunc("POST /v1/admin", func(w http.ResponseWriter, r *http.Request) {
		var c Command
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		d.DisallowUnknownFields()
		if err := d.Decode(&c); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), enrolTime)
		defer cancel()
		answer, err := e.Admin(ctx, c)
		if err != nil {
			e.Log.Warn("administrator", "action", c.Do, "error", err)
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		e.Log.Info("administrator", "action", c.Do, "user", e.store.get().User)
		writeJSON(w, answer)
	})
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: enrolTime + 10*time.Second, MaxHeaderBytes: 4 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(e.Log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	err := srv.Serve(netutil.LimitListener(Only(l, e.Log, 0, uint32(unix.Getuid())), maxClients))
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}

// ServeCard takes QEMU's connections on l until ctx ends, of the users allow
// alone.
func (e *Engine) ServeCard(ctx context.Context, l net.Listener, allow ...uint32) error {
	l = Only(l, e.Log, append(allow, uint32(unix.Getuid()))...)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	done := make(chan struct{}, 2) // a QEMU and the one that takes its place
	for {
		conn, err := l.Accept()
		if err != nil {
			for range cap(done) {
				done <- struct{}{}
			}
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("card socket: %w", err)
		}
		done <- struct{}{}
		go func() {
			defer func() { <-done }()
			if err := e.Slot.Serve(ctx, conn); err != nil {
				e.Log.Warn("card reader", "error", err)
			}
		}()
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
