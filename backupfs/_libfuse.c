/* SPDX-License-Identifier: GPL-3.0-or-later
 *
 * Two things that pyfuse3 lacks: lseek(SEEK_DATA, SEEK_HOLE), for which it has no handler (see
 * seeks.py), and letting other threads run while it answers a read (see fuse_reply_buf below).
 *
 *   pyfuse3 ──fuse_session_new──► ours: copies the operations, sets .lseek ──► libfuse's own
 *   kernel ──FUSE_LSEEK──► libfuse ──► arrived() ──► the listener, with a Request
 *                                      Request.found(), .failed() ──► fuse_reply_*
 *
 * Loaded with RTLD_GLOBAL before pyfuse3, this library comes before libfuse in the order in which
 * the dynamic linker looks pyfuse3's symbols up. It is not linked with libfuse: it finds the one
 * that its caller is linked with, of whatever version and name. Only libfuse's public structs and
 * functions are used; `lseek` in the operations and `fh` in the file's info lie where they lay in
 * 3.8, which first had lseek, up to 3.18 (the operations may only grow at their end).
 *
 * Law: the list `waiting` has each request that is not answered. Who answers takes it off first,
 * so none is answered twice; a Request that is thrown away answers EIO, so none is forgotten; and
 * end() answers what is left before the session, and with it all requests, is freed. All of it
 * happens with the GIL held.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <dlfcn.h>
#include <errno.h>
#include <fuse3/fuse_lowlevel.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

typedef struct Request {
	PyObject_HEAD
	fuse_req_t req; /* NULL: answered */
	struct Request *previous, *next;
} Request;

static Request *waiting;
static PyObject *listener; /* NULL: nobody is there to answer */
static unsigned long sessions;

static int (*reply_lseek)(fuse_req_t, off_t);
static int (*reply_err)(fuse_req_t, int);

#define WORTH_WHILE 65536 /* bytes; letting go of the GIL costs some microseconds */

/* --- a request ------------------------------------------------------------------------------- */

/* Return what the request must be answered with; NULL if it has been. */
static fuse_req_t take(Request *self)
{
	fuse_req_t req = self->req;

	if (req == NULL)
		return NULL;
	self->req = NULL;
	if (self->previous)
		self->previous->next = self->next;
	else
		waiting = self->next;
	if (self->next)
		self->next->previous = self->previous;
	return req;
}

static void fail(Request *self, int number)
{
	fuse_req_t req = take(self);

	/* An error of the reply says that nobody waits for it any more; libfuse has freed it. */
	if (req != NULL)
		reply_err(req, number);
}

static PyObject *request_found(Request *self, PyObject *argument)
{
	long long offset = PyLong_AsLongLong(argument);
	fuse_req_t req;

	if (offset == -1 && PyErr_Occurred())
		return NULL;
	req = take(self);
	if (req != NULL)
		reply_lseek(req, (off_t)offset);
	Py_RETURN_NONE;
}

static PyObject *request_failed(Request *self, PyObject *argument)
{
	int number = (int)PyLong_AsLong(argument);

	if (number == -1 && PyErr_Occurred())
		return NULL;
	fail(self, number);
	Py_RETURN_NONE;
}

static void request_dealloc(Request *self)
{
	fail(self, EIO);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef request_methods[] = {
	{"found", (PyCFunction)request_found, METH_O, "Answer with an offset; only the first answer counts."},
	{"failed", (PyCFunction)request_failed, METH_O, "Answer with an errno; only the first answer counts."},
	{NULL, NULL, 0, NULL},
};

static PyTypeObject RequestType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "backupfs._libfuse.Request",
	.tp_doc = "A process that waits in lseek(2). Thrown away unanswered, it fails with EIO.",
	.tp_basicsize = sizeof(Request),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_dealloc = (destructor)request_dealloc,
	.tp_methods = request_methods,
};

static Request *make_request(fuse_req_t req)
{
	Request *self = PyObject_New(Request, &RequestType);

	if (self == NULL)
		return NULL;
	self->req = req;
	self->previous = NULL;
	self->next = waiting;
	if (waiting)
		waiting->previous = self;
	waiting = self;
	return self;
}

/* --- what libfuse calls ---------------------------------------------------------------------- */

/* libfuse's lseek operation. pyfuse3 has the GIL when it lets libfuse call; nothing promises it. */
static void arrived(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *fi)
{
	PyGILState_STATE gil = PyGILState_Ensure();
	Request *request = make_request(req);
	PyObject *called = listener, *result;

	if (request == NULL) {
		reply_err(req, ENOMEM);
		PyErr_Clear();
	} else if (called == NULL) {
		fail(request, EIO);
		Py_DECREF(request);
	} else {
		Py_INCREF(called); /* it may call end() */
		result = PyObject_CallFunction(called, "OKKLi", request, (unsigned long long)inode,
					       (unsigned long long)fi->fh, (long long)offset, whence);
		if (result == NULL)
			PyErr_WriteUnraisable(called);
		Py_XDECREF(result);
		Py_DECREF(called);
		Py_DECREF(request);
	}
	PyGILState_Release(gil);
}

/* --- what pyfuse3 calls, in place of libfuse's ------------------------------------------------ */

struct libfuse_version;

typedef struct fuse_session *plain_function(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *versioned_function(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
						struct libfuse_version *, void *);

/* Return a handle of the library, or module, that has *address* in it; NULL: there is none. */
static void *library_of(void *address)
{
	Dl_info info;

	return dladdr(address, &info) ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
}

/*
 * Find *name* in what the caller is linked with, and complete the operations, if they can be: then
 * *op and *op_size are those of a copy, which is returned in *copy, to be freed. A library's own
 * scope is searched, not the global one, so this never finds us.
 */
static void *take_up(void *caller, const char *name, const struct fuse_lowlevel_ops **op, size_t *op_size,
		     struct fuse_lowlevel_ops **copy)
{
	const size_t reach = offsetof(struct fuse_lowlevel_ops, lseek) + sizeof (*op)->lseek;
	const size_t size = *op_size < reach ? reach : *op_size; /* pyfuse3 may know more operations, or fewer */
	PyGILState_STATE gil = PyGILState_Ensure();
	void *library = library_of(caller), *real = NULL;

	if (library != NULL) {
		real = dlsym(library, name);
		*(void **)&reply_lseek = dlsym(library, "fuse_reply_lseek");
		*(void **)&reply_err = dlsym(library, "fuse_reply_err");
		dlclose(library); /* the caller is in it: it stays */
	}
	if (real && reply_lseek && reply_err && listener && (*copy = calloc(1, size)) != NULL) {
		memcpy(*copy, *op, *op_size);
		if ((*copy)->lseek == NULL) {
			(*copy)->lseek = arrived;
			sessions++;
		}
		*op = *copy;
		*op_size = size;
	}
	PyGILState_Release(gil);
	if (real == NULL)
		errno = ENOSYS;
	return real;
}

#undef fuse_session_new /* a macro since 3.17 */

EXPORTED struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
					       size_t op_size, void *userdata)
{
	struct fuse_lowlevel_ops *copy = NULL;
	struct fuse_session *made;
	plain_function *real;

	*(void **)&real = take_up(__builtin_return_address(0), "fuse_session_new", &op, &op_size, &copy);
	made = real ? real(args, op, op_size, userdata) : NULL; /* which copies the operations */
	free(copy);
	return made;
}

/* What the macro comes to in programs built with libfuse 3.17 and later. */
EXPORTED struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
							 size_t op_size, struct libfuse_version *version,
							 void *userdata)
{
	struct fuse_lowlevel_ops *copy = NULL;
	struct fuse_session *made;
	versioned_function *real;

	*(void **)&real = take_up(__builtin_return_address(0), "fuse_session_new_versioned", &op, &op_size, &copy);
	made = real ? real(args, op, op_size, version, userdata) : NULL;
	free(copy);
	return made;
}

/*
 * pyfuse3 answers a read with the GIL held, for the 200 microseconds in which a megabyte is copied
 * to the kernel; the threads that read the next one stood still meanwhile. Whose buffer it is may
 * not change before the handler awaits, which it cannot in here.
 */
EXPORTED int fuse_reply_buf(fuse_req_t req, const char *buf, size_t size)
{
	static int (*real)(fuse_req_t, const char *, size_t);
	PyThreadState *state;
	int result;

	if (real == NULL) {
		void *library = library_of(__builtin_return_address(0));

		if (library == NULL || (*(void **)&real = dlsym(library, "fuse_reply_buf")) == NULL)
			return -ENOSYS;
		dlclose(library); /* the caller is in it: it stays */
	}
	if (size < WORTH_WHILE || !PyGILState_Check())
		return real(req, buf, size);
	state = PyEval_SaveThread();
	result = real(req, buf, size);
	PyEval_RestoreThread(state);
	return result;
}

/* --- the module ------------------------------------------------------------------------------ */

static PyObject *module_listen(PyObject *module, PyObject *callable)
{
	(void)module;
	Py_INCREF(callable);
	Py_XSETREF(listener, callable);
	Py_RETURN_NONE;
}

static PyObject *module_end(PyObject *module, PyObject *nothing)
{
	unsigned long count = 0;

	(void)module;
	(void)nothing;
	Py_CLEAR(listener);
	for (; waiting != NULL; count++)
		fail(waiting, EIO);
	return PyLong_FromUnsignedLong(count);
}

static PyObject *module_sessions(PyObject *module, PyObject *nothing)
{
	(void)module;
	(void)nothing;
	return PyLong_FromUnsignedLong(sessions);
}

static PyMethodDef module_methods[] = {
	{"listen", module_listen, METH_O,
	 "listen(callable): have it called with (request, inode, handle, offset, whence).\n\n"
	 "Must come before the session is made."},
	{"end", module_end, METH_NOARGS,
	 "Answer what still waits with EIO, return how many did, and listen no more.\n\n"
	 "Must come before the session is destroyed."},
	{"sessions", module_sessions, METH_NOARGS, "Return how many sessions were given our lseek."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "backupfs._libfuse",
	.m_doc = "lseek(SEEK_DATA, SEEK_HOLE) for pyfuse3.",
	.m_size = -1,
	.m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__libfuse(void)
{
	PyObject *module;

	if (PyType_Ready(&RequestType) < 0)
		return NULL;
	module = PyModule_Create(&module_definition);
	if (module != NULL && PyModule_AddObjectRef(module, "Request", (PyObject *)&RequestType) < 0)
		Py_CLEAR(module);
	return module;
}
