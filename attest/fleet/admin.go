package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"sekisho/attest"
)

// Paths of the admin API, on a unix socket that only its owner can open.
const (
	AdminTickets    = "/admin/v1/tickets"    // POST TicketRequest → TicketResponse
	AdminDevices    = "/admin/v1/devices"    // GET → []Device; /{id} → Device; DELETE /{id}?reason= → Former
	AdminResults    = "/admin/v1/results"    // GET → []attest.Result, oldest first
	AdminBackup     = "/admin/v1/backup"     // GET → text, see store.ReadBackup
	AdminReferences = "/admin/v1/references" // GET → []Reference; POST values; DELETE ?id=
)

// backupTime bounds a backup over the socket.
const backupTime = 10 * time.Minute

// TicketRequest asks for a ticket.
type TicketRequest struct {
	Uses    int   `json:"uses"`
	Seconds int64 `json:"seconds"` // until it expires
}

// TicketResponse is a new ticket. Its text is shown this once.
type TicketResponse struct {
	Ticket  string    `json:"ticket"` // secret
	ID      string    `json:"id"`
	Uses    int       `json:"uses"`
	Expires time.Time `json:"expires"`
}

// Reference is one image that is accepted.
type Reference struct {
	ID      string                 `json:"id"`
	Source  string                 `json:"source"` // "configuration" or "registry"
	PCRs    map[int]attest.Digest  `json:"pcrs"`
	Details attest.ReferenceValues `json:"-"`
}

// ServeAdmin serves the admin API on a new unix socket at path, mode 0600,
// until ctx ends.
func ServeAdmin(ctx context.Context, path string, s *Service, log *slog.Logger) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("admin socket: %w", err)
	}
	// The socket is made in a directory of our own, so nobody can connect
	// between its birth and its mode.
	dir, err := os.MkdirTemp(parent(path), ".admin")
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(dir+"/s", 0o600), os.Rename(dir+"/s", path)); err != nil {
		return errors.Join(fmt.Errorf("admin socket: %w", err), l.Close())
	}
	defer os.Remove(path)
	return serve(ctx, l, AdminHandler(s, log), log)
}

func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "."
}

// AdminHandler returns the admin API.
func AdminHandler(s *Service, log *slog.Logger) http.Handler {
	a := &admin{s, log}
	mux := http.NewServeMux()
	for _, r := range a.routes() {
		mux.HandleFunc(r.pattern, r.handler)
	}
	return mux
}

// routes are all of the admin API, which only the owner of its socket reaches.
func (a *admin) routes() []route {
	return slices.Concat([]route{
		{pattern: "POST " + AdminTickets, handler: a.createTicket},
		{pattern: "GET " + AdminDevices, handler: a.devices},
		{pattern: "GET " + AdminDevices + "/{id}", handler: a.device},
		{pattern: "DELETE " + AdminDevices + "/{id}", handler: a.retireDevice},
		{pattern: "GET " + AdminResults, handler: func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, a.Results()) }},
		{pattern: "GET " + AdminReferences, handler: a.references},
		{pattern: "POST " + AdminReferences, handler: a.addReference},
		{pattern: "DELETE " + AdminReferences, handler: a.removeReference},
		{pattern: "GET " + AdminEscrows + "/{id}", handler: a.escrows},
		{pattern: "GET " + AdminBackup, handler: a.backup},
	}, a.identityRoutes(), a.recoveryRoutes(), a.policyRoutes(), a.logonRoutes(), a.auditRoutes(), a.suspensionRoutes(), a.releaseRoutes())
}

type admin struct {
	*Service
	log *slog.Logger
}

// adminError is the body of an answer that is not 200.
type adminError struct {
	Error string `json:"error"`
}

func (a *admin) fail(w http.ResponseWriter, code int, err error) {
	reply(w, code, adminError{err.Error()})
}

func (a *admin) createTicket(w http.ResponseWriter, r *http.Request) {
	var req TicketRequest
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, attest.MaxMessage))
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	text, t, err := a.CreateTicket(r.Context(), req.Uses, time.Duration(req.Seconds)*time.Second)
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	a.log.Info("ticket created", "id", t.ID, "uses", t.Uses, "expires", t.Expires)
	reply(w, http.StatusOK, TicketResponse{text.Reveal(), t.ID, t.Uses, t.Expires})
}

func (a *admin) devices(w http.ResponseWriter, r *http.Request) {
	list, err := a.Devices(r.Context())
	answer(a, w, list, err)
}

// answer sends v, or err if there is one.
func answer[T any](a *admin, w http.ResponseWriter, v T, err error) {
	if err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	reply(w, http.StatusOK, v)
}

// id reads a device id.
func (a *admin) id(w http.ResponseWriter, text string) (id attest.Digest, ok bool) {
	if err := id.UnmarshalText([]byte(text)); err != nil {
		a.fail(w, http.StatusBadRequest, fmt.Errorf("device id: %w", err))
		return id, false
	}
	return id, true
}

func (a *admin) device(w http.ResponseWriter, r *http.Request) {
	id, ok := a.id(w, r.PathValue("id"))
	if !ok {
		return
	}
	d, found, err := a.Device(r.Context(), id)
	if err == nil && !found {
		a.fail(w, http.StatusNotFound, fmt.Errorf("device %s is not enrolled", id))
		return
	}
	answer(a, w, d, err)
}

// retireDevice is DELETE of a device: its record moves to the former ones.
func (a *admin) retireDevice(w http.ResponseWriter, r *http.Request) {
	id, ok := a.id(w, r.PathValue("id"))
	if !ok {
		return
	}
	f, err := a.Retire(r.Context(), id, r.URL.Query().Get("reason"))
	switch {
	case errors.Is(err, errUnknownDevice):
		a.fail(w, http.StatusNotFound, err)
	case err != nil:
		a.fail(w, http.StatusBadRequest, err)
	default:
		a.log.Warn("device retired", "device", id, "reason", f.Reason)
		reply(w, http.StatusOK, f)
	}
}

// backup sends all records. One that breaks off has no end, which its reader
// notices.
func (a *admin) backup(w http.ResponseWriter, r *http.Request) {
	http.NewResponseController(w).SetWriteDeadline(a.Now().Add(backupTime))
	b, err := a.Store.Backup(r.Context(), w, a.Now())
	if err != nil {
		a.log.Error("backup", "error", err)
		return
	}
	a.log.Info("backup", "records", b.Records, "revision", b.Revision)
}

func (a *admin) references(w http.ResponseWriter, _ *http.Request) {
	list := []Reference{}
	for _, v := range a.References {
		list = append(list, Reference{ReferenceID(v), "configuration", v.PCRs, v})
	}
	for _, v := range a.added() {
		list = append(list, Reference{ReferenceID(v), "registry", v.PCRs, v})
	}
	reply(w, http.StatusOK, list)
}

func (a *admin) addReference(w http.ResponseWriter, r *http.Request) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, attest.MaxMessage))
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	v, err := attest.ParseReferenceValues(data)
	if err == nil && a.Policies != nil {
		err = errors.New("policy_keys are configured: reference values come in a signed policy, see attestctl policy")
	}
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	id := ReferenceID(*v)
	if err := a.AddReference(r.Context(), *v); err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	a.log.Info("reference values added", "id", id)
	reply(w, http.StatusOK, Reference{id, "registry", v.PCRs, *v})
}

func (a *admin) removeReference(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	found, err := a.RemoveReference(r.Context(), id)
	if err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	if !found {
		a.fail(w, http.StatusNotFound, fmt.Errorf("no reference values %q in the registry; those of the configuration are removed there", id))
		return
	}
	a.log.Info("reference values removed", "id", id)
	reply(w, http.StatusOK, struct{}{})
}
